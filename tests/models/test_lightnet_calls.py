"""LightNet as a language model: its cache by hand, empty and wrong arguments, and what generate() refuses."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from lightnet_cases import POSITIONS, assert_same, build, tokens
from transformers import AutoModel, AutoModelForCausalLM, DynamicCache

from sightline.models import RecurrenceCache
from sightline.recurrence import RecurrenceState


@pytest.mark.parametrize("position_encoding", POSITIONS)
@pytest.mark.parametrize(("batch", "length"), [(2, 0), (0, 9)])
def test_of_no_tokens_there_are_no_logits(position_encoding, batch, length):
    model = build(position_encoding=position_encoding)
    output = model(tokens(batch, length), output_hidden_states=True, use_cache=True)
    assert output.logits.shape == (batch, length, 61)
    assert [states.shape for states in output.hidden_states] == [(batch, length, 32)] * 3
    if length == 0:
        prompt = tokens(2, 5)
        assert_same(model(prompt, past_key_values=output.past_key_values).logits, model(prompt).logits)


def test_a_copy_of_a_cache_with_a_history_is_cut_from_it():
    model, input_ids = build(), tokens(1, 12)
    cache = model(input_ids[:, :6], use_cache=True).past_key_values
    other = copy.deepcopy(cache)
    assert not any(tensor.requires_grad for layer in other.layers for tensor in layer.state)
    expected = model(input_ids[:, 6:], past_key_values=cache).logits
    assert (cache.get_seq_length(), other.get_seq_length()) == (12, 6)
    assert_same(model(input_ids[:, 6:], past_key_values=other).logits, expected)


@torch.no_grad()
def test_batch_entries_of_a_cache_are_selected_and_repeated():
    model, input_ids = build(), tokens(3, 12)
    expected = model(input_ids).logits[:, 6:]
    cache = model(input_ids[:, :6]).past_key_values
    cache.batch_select_indices(torch.tensor([2, 0]))
    cache.batch_repeat_interleave(2)
    rows = [2, 2, 0, 0]
    assert_same(model(input_ids[rows, 6:], past_key_values=cache).logits, expected[rows])


def test_a_layer_that_was_offloaded_comes_back():
    layer = RecurrenceCache(1).layer(0)
    layer.offload()
    layer.prefetch()
    assert layer.state is None
    state = RecurrenceState(torch.randn(1, 2, 3), torch.randn(1, 2, 3, 4))
    layer.store(state, 5)
    layer.offload()
    layer.prefetch()
    assert layer.length == 5
    assert all(torch.equal(*pair) for pair in zip(layer.state, state, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("position_encoding", POSITIONS)
def test_beams_and_a_cache_go_on_after_padding_on_the_left(position_encoding):
    model, short = build(position_encoding=position_encoding), tokens(1, 4)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.int64), short], 1)
    both, mask = torch.cat([padded, tokens(1, 7)]), torch.ones(2, 7, dtype=torch.int64)
    mask[0, :3] = 0
    options = {"num_beams": 3, "do_sample": False, "max_new_tokens": 5}
    alone = model.generate(short, attention_mask=mask[:1, 3:], **options)
    beside = model.generate(both, attention_mask=mask, **options)
    assert torch.equal(beside[0, 3:], alone[0])
    first = model.generate(
        both, attention_mask=mask, max_new_tokens=2, do_sample=False, return_dict_in_generate=True, use_cache=True
    )
    longer = torch.cat([mask, torch.ones(2, 2, dtype=torch.int64)], 1)
    second = model.generate(
        first.sequences,
        attention_mask=longer,
        past_key_values=first.past_key_values,
        max_new_tokens=3,
        do_sample=False,
    )
    whole = model.generate(both, attention_mask=mask, max_new_tokens=5, do_sample=False)
    assert torch.equal(second, whole)


def test_generation_refuses_what_has_no_cache_of_this_kind():
    model, input_ids = build(), tokens(1, 7)
    with pytest.raises(NotImplementedError, match=r"^generate_batch: its cache holds keys and values"):
        model.generate_batch([[1, 2, 3]])
    with pytest.raises(TypeError, match=r"^past_key_values: expected a RecurrenceCache, got DynamicCache"):
        model.generate(input_ids, past_key_values=DynamicCache(), max_new_tokens=2)
    with pytest.raises(ValueError, match=r"^past_key_values: expected 2 layers, got 3"):
        model.generate(input_ids, past_key_values=RecurrenceCache(3), max_new_tokens=2)
    expected = model.generate(input_ids, max_new_tokens=3, do_sample=False)
    model.gradient_checkpointing_enable()
    model.train()
    with pytest.raises(ValueError, match=r"^use_cache: expected False in training .* call eval\(\)"):
        model.generate(input_ids, max_new_tokens=3, do_sample=False)
    assert torch.equal(model.generate(input_ids, max_new_tokens=3, do_sample=False, use_cache=False), expected)
    assert torch.equal(model.eval().generate(input_ids, max_new_tokens=3, do_sample=False), expected)


@torch.no_grad()
def test_saved_in_shards_loaded_in_other_forms_and_resized(tmp_path):
    model, input_ids = build(), tokens(2, 9)
    expected = model(input_ids, output_hidden_states=True)
    model.save_pretrained(tmp_path / "whole", max_shard_size="20KB")
    assert len(list((tmp_path / "whole").glob("*.safetensors"))) > 1
    low = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", dtype=torch.bfloat16)
    assert {weight.dtype for weight in low.parameters()} == {torch.bfloat16}
    assert (low(input_ids).logits.float() - expected.logits).norm() < 0.05 * expected.logits.norm()
    base = AutoModel.from_pretrained(tmp_path / "whole")
    assert torch.equal(base(input_ids).last_hidden_state, expected.hidden_states[-1])
    base.save_pretrained(tmp_path / "base")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert torch.equal(again(input_ids, output_hidden_states=True).hidden_states[-1], expected.hidden_states[-1])
    model.resize_token_embeddings(70)
    assert_same(model(input_ids).logits[..., :61], expected.logits)
    assert model(input_ids + 9).logits.shape == (2, 9, 70)


@torch.no_grad()
def test_a_cache_of_another_batch_or_model_is_refused_by_name():
    model = build()
    cache = model(tokens(2, 5)).past_key_values
    with pytest.raises(ValueError, match=r"^past_key_values: expected states of 3 batch entries, got 2"):
        model(tokens(3, 1), past_key_values=cache)
    with pytest.raises(ValueError, match=r"^past_key_values: expected states of 4 key heads, got 2"):
        build(num_key_value_heads=4)(tokens(2, 1), past_key_values=cache)
    with pytest.raises(TypeError, match=r"^past_key_values: expected states in float64, got float32$"):
        build().double()(tokens(2, 1), past_key_values=cache)
    with pytest.raises(TypeError, match=r"^past_key_values: expected states in float64, got float32$"):
        build().double().generate(tokens(2, 6), past_key_values=cache, max_new_tokens=1)
    expected = r"^past_key_values: expected log_normalizer of shape \(B, Hk, Dk\) = "
    with pytest.raises(ValueError, match=expected + r"\(2, 2, 10\), got \(2, 2, 16\)$"):
        build(key_dim=5)(tokens(2, 1), past_key_values=cache)
    with pytest.raises(ValueError, match=expected + r"\(2, 2, 8\), got \(2, 2, 16\)$"):
        build(position_encoding=None)(tokens(2, 1), past_key_values=cache)
    expected = r"^past_key_values: expected memory of shape \(B, Hk, Dk, Dv\) = "
    with pytest.raises(ValueError, match=expected + r"\(2, 2, 16, 16\), got \(2, 2, 16, 8\)$"):
        build(hidden_size=64, key_dim=8)(tokens(2, 1), past_key_values=cache)
    with pytest.raises(TypeError, match=r"^num_layers: expected a whole number of at least 1, got str"):
        RecurrenceCache("a")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("input_ids", [[1, 2]]),
        ("inputs_embeds", [[1.0]]),
        ("attention_mask", [[1] * 9]),
        ("position_ids", list(range(9))),
        ("cu_seq_lens_q", [0, 9]),
    ],
)
def test_what_is_no_tensor_is_refused_by_name(name, value):
    arguments = {name: value} if name.startswith("input") else {"input_ids": tokens(1, 9), name: value}
    with pytest.raises(TypeError, match=f"^{name}: expected a tensor, got list"):
        build()(**arguments)


@torch.no_grad()
@pytest.mark.parametrize("position_encoding", POSITIONS)
@pytest.mark.parametrize(
    ("offsets", "documents"),
    [
        ([0, 2**40], [9]),
        ([0, 4, 2**31, 2**32 + 2], [4, 5]),
        ([-(2**32) + 3, 5, 9], [5, 4]),
        ([0, 4, 2**31 - 1], [4, 5]),
    ],
)
def test_offsets_beyond_the_end_are_the_end(position_encoding, offsets, documents):
    model, input_ids = build(position_encoding=position_encoding), tokens(1, 9)
    apart = torch.cat([model(piece).logits for piece in input_ids.split(documents, dim=1)], 1)
    positions = torch.cat([torch.arange(length) for length in documents])[None]
    assert_same(model(input_ids, position_ids=positions, cu_seq_lens_q=torch.tensor(offsets)).logits, apart)


@torch.no_grad()
def test_tokens_outside_of_all_documents_read_no_other():
    model, input_ids = build(), tokens(1, 9)
    offsets = torch.tensor([2, 6])
    logits = model(input_ids, cu_seq_lens_q=offsets).logits
    changed = input_ids.clone()
    changed[:, [0, 3, 7]] = input_ids[:, [0, 3, 7]] % 60 + 1
    same = (model(changed, cu_seq_lens_q=offsets).logits - logits).abs().amax((0, 2)) < 1e-5
    assert same.tolist() == [False, True, True, False, False, False, True, False, True]


def test_offsets_of_documents_are_whole_numbers():
    with pytest.raises(TypeError, match=r"^cu_seq_lens_q: expected dtype int32, got float32"):
        build()(tokens(1, 9), cu_seq_lens_q=torch.tensor([0.0, 9.0]))


BAD_CALLS = {
    "input_ids: expected shape (B, N), got (9,)": {"input_ids": torch.ones(9, dtype=torch.int64)},
    "inputs_embeds: expected shape (B, N, 32), got (1, 9, 33)": {"inputs_embeds": torch.ones(1, 9, 33)},
    "inputs_embeds: expected shape (B, N, 32), got (9, 32)": {"inputs_embeds": torch.ones(9, 32)},
    "position_ids: expected shape (B, N) = (1, 9), got (9,)": {"input_ids": 9, "position_ids": torch.arange(9)},
    "position_ids: expected shape (B, N) = (1, 9), got (1, 8)": {"input_ids": 9, "position_ids": torch.arange(8)[None]},
    "position_ids: expected shape (B, N) = (1, 9), got (2, 9)": {
        "input_ids": 9,
        "position_ids": torch.arange(9).expand(2, 9),
    },
    "cu_seq_lens_q: expected shape (documents + 1,), got (1, 3)": {
        "input_ids": 9,
        "cu_seq_lens_q": torch.tensor([[0, 4, 9]]),
    },
    "past_key_values: expected 2 layers, got 1": {"input_ids": 9, "past_key_values": RecurrenceCache(1)},
    "past_key_values: expected 2 layers, got 3": {"input_ids": 9, "past_key_values": RecurrenceCache(3)},
    "input_ids: expected either input_ids or inputs_embeds": {},
    "output_attentions: expected False": {"input_ids": 9, "output_attentions": True},
    "attention_mask: expected shape (B, N) with B = 1, got (1, 1, 9, 9)": {
        "input_ids": 9,
        "attention_mask": torch.ones(1, 1, 9, 9),
    },
    "attention_mask: expected 9 tokens, or 9 with those of the cache, got 7": {
        "input_ids": 9,
        "attention_mask": torch.ones(1, 7),
    },
    "past_key_values: expected None with packed documents": {
        "input_ids": 9,
        "position_ids": torch.arange(9)[None] % 5,
        "past_key_values": RecurrenceCache(2),
    },
    "attention_mask: expected None with packed documents": {
        "input_ids": 9,
        "cu_seq_lens_q": torch.tensor([0, 4, 9]),
        "attention_mask": torch.ones(1, 9),
    },
}


@pytest.mark.parametrize("message", BAD_CALLS)
def test_bad_calls_are_refused_by_name(message):
    arguments = dict(BAD_CALLS[message])
    if isinstance(arguments.get("input_ids"), int):
        arguments["input_ids"] = tokens(1, arguments["input_ids"])
    with pytest.raises(ValueError, match=r"^" + re.escape(message)):
        build()(**arguments)
