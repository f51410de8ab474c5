"""LightNet as a language model: what users of transformers' causal models do, with a state in the place of a cache."""

from __future__ import annotations

import copy
import re
import weakref

import pytest
import torch
from lightnet_cases import POSITIONS, SIZES, assert_same, build, tokens
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM

from sightline.models import LightNetConfig, LightNetForCausalLM, LightNetModel, RecurrenceCache


@pytest.mark.parametrize("position_encoding", POSITIONS)
@pytest.mark.parametrize("pieces", [[1] * 13, [5, 8], [1, 11, 1]])
def test_pieces_equal_the_whole(position_encoding, pieces):
    model, input_ids = build(position_encoding=position_encoding), tokens(2, 13)
    whole = model(input_ids, use_cache=False)
    assert whole.past_key_values is None
    cache, logits = None, []
    for piece in input_ids.split(pieces, dim=1):
        output = model(piece, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits.append(output.logits)
    assert_same(torch.cat(logits, 1), whole.logits)
    assert cache.get_seq_length() == 13


@pytest.mark.parametrize("position_encoding", POSITIONS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_real_token(position_encoding, side):
    model, input_ids, lengths = build(position_encoding=position_encoding), tokens(3, 9), [9, 4, 1]
    mask = torch.stack([torch.arange(9) < length for length in lengths]).long()
    mask = mask.flip(1) if side == "left" else mask
    logits = model(input_ids, attention_mask=mask).logits
    for row, length in enumerate(lengths):
        real = mask[row].bool()
        assert real.sum() == length
        assert_same(logits[row, real], model(input_ids[row : row + 1, real]).logits[0])


@pytest.mark.parametrize("position_encoding", POSITIONS)
def test_packed_documents_do_not_see_each_other(position_encoding):
    model, input_ids = build(position_encoding=position_encoding), tokens(1, 12)
    apart = torch.cat([model(piece).logits for piece in input_ids.split([5, 1, 6], dim=1)], 1)
    positions = torch.cat([torch.arange(length) for length in (5, 1, 6)])[None]
    packed = model(input_ids, position_ids=positions)
    assert packed.past_key_values is None
    assert_same(packed.logits, apart)
    offsets = torch.tensor([0, 5, 6, 12], dtype=torch.int32)
    assert_same(model(input_ids, position_ids=positions, cu_seq_lens_q=offsets, cu_seq_lens_k=offsets).logits, apart)
    rows = torch.cat([input_ids, input_ids.flip(1)])
    both = model(rows, position_ids=positions.expand(2, -1), output_hidden_states=True)
    assert_same(both.logits[:1], apart)
    assert [tuple(state.shape) for state in both.hidden_states] == [(2, 12, 32)] * 3
    assert_same(model(rows, position_ids=positions).logits, both.logits)  # one row of positions for all


def test_states_of_layers_are_kept_for_those_who_ask_alone():
    model, input_ids, alive = build(), tokens(1, 12), []

    def note(module, arguments, output):
        alive.append(weakref.ref(output))

    model.model.layers[0].register_forward_hook(note)
    model.model.norm.register_forward_pre_hook(lambda *_: alive.append(alive[-1]() is not None))
    with torch.no_grad():
        model(input_ids)
        model(input_ids, output_hidden_states=True)
    assert alive[1::2] == [False, True]


def test_positions_that_count_on_are_one_document():
    model, input_ids = build(), tokens(2, 8)
    later = model(input_ids, position_ids=torch.arange(7, 15)[None])
    assert_same(later.logits, model(input_ids).logits)
    assert later.past_key_values.get_seq_length() == 8


PACKED_POSITIONS = torch.cat([torch.arange(length) for length in (5, 1, 6)])[None]
COMPILED_CALLS = {
    "plain": {},
    "attention_mask": {"attention_mask": (torch.arange(12) >= torch.tensor([[0], [4]])).long()},
    "position_ids": {"position_ids": torch.arange(12)[None]},
    "packed position_ids": {"position_ids": torch.cat([PACKED_POSITIONS, PACKED_POSITIONS.flip(1)])},
}


# Compiling takes the time. Documents reset the positions of an encoding, and a mask or plain positions do not.
@pytest.mark.parametrize(
    ("call", "position_encoding"),
    [
        ("plain", None),
        ("plain", "lrpe"),
        ("attention_mask", "lrpe"),
        ("position_ids", None),
        ("packed position_ids", None),
        ("packed position_ids", "lrpe"),
    ],
)
def test_compiled_without_graph_breaks_it_gives_what_it_gives_eagerly(call, position_encoding):
    model, input_ids, arguments = build(position_encoding=position_encoding), tokens(2, 12), COMPILED_CALLS[call]
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected, actual = (run(input_ids, labels=input_ids, **arguments) for run in (model, compiled))
    assert_same(actual.logits, expected.logits)
    parameters = list(model.parameters())
    for one, other in zip(*(torch.autograd.grad(run.loss, parameters) for run in (actual, expected)), strict=True):
        assert_same(one, other)
    # A graph cannot look whether positions count on: they may always mean documents, which leave no cache.
    assert (actual.past_key_values is None) == ("position_ids" in call)


def test_compiled_it_goes_on_from_a_cache():
    model, input_ids = build(position_encoding="lrpe"), tokens(2, 12)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    cache = model(input_ids[:, :7]).past_key_values
    later = compiled(input_ids[:, 7:], position_ids=torch.arange(7, 12)[None], past_key_values=cache)
    assert_same(later.logits, model(input_ids).logits[:, 7:])
    assert later.past_key_values.get_seq_length() == 12


def test_loss_is_that_of_the_next_token_and_gradients_reach_every_weight():
    model, input_ids = build(), tokens(2, 10)
    labels = input_ids.clone()
    labels[0, :4] = -100
    output = model(input_ids, labels=labels)
    expected = torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(output.loss, expected)
    output.loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(reentrant):
    model, input_ids = build().train(), tokens(2, 10)
    model(input_ids, labels=input_ids).loss.backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    calls = []
    model.model.layers[0].attn.register_forward_hook(lambda *_: calls.append(1))
    model(input_ids, labels=input_ids).loss.backward()
    assert len(calls) == 2
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
    assert model(input_ids, use_cache=True).past_key_values is None
    with pytest.raises(ValueError, match="past_key_values: expected None with gradient checkpointing"):
        model(input_ids, past_key_values=RecurrenceCache(2))


def test_logits_to_keep_hidden_states_and_tuples():
    model, input_ids = build(), tokens(2, 10)
    whole = model(input_ids, output_hidden_states=True)
    assert_same(model(input_ids, logits_to_keep=3).logits, whole.logits[:, -3:])
    assert_same(model(input_ids, logits_to_keep=torch.tensor([1, 4])).logits, whole.logits[:, [1, 4]])
    assert len(whole.hidden_states) == 3
    assert_same(model.lm_head(whole.hidden_states[-1]), whole.logits)
    assert_same(model(inputs_embeds=model.get_input_embeddings()(input_ids)).logits, whole.logits)
    logits, cache = model(input_ids, return_dict=False)
    assert_same(logits, whole.logits)
    assert isinstance(cache, RecurrenceCache)


@pytest.mark.parametrize("tied", [False, True])
def test_what_is_saved_is_loaded_by_the_auto_classes(tmp_path, tied):
    model, input_ids = build(tie_word_embeddings=tied, gate="swish", gate_norm_eps=1e-3), tokens(1, 10)
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is LightNetConfig
    assert config.to_dict() == {**model.config.to_dict(), "_name_or_path": config._name_or_path}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is LightNetForCausalLM
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    assert torch.equal(loaded(input_ids).logits, model(input_ids).logits)
    base = AutoModel.from_pretrained(tmp_path)
    assert type(base) is LightNetModel
    assert torch.equal(base(input_ids).last_hidden_state, model.model(input_ids).last_hidden_state)


def test_fresh_weights_have_the_spread_of_the_config():
    model = build(hidden_size=256, num_hidden_layers=8, initializer_range=0.02)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
        else:
            expected = 0.02 / 4 if "o_proj" in name or "down_proj" in name else 0.02
            drawn = parameter[1:] if "embed_tokens" in name else parameter
            assert drawn.std().item() == pytest.approx(expected, rel=0.05), name
    assert not model.model.embed_tokens.weight[0].any()


def test_weights_missing_in_a_file_are_drawn_as_fresh_ones_are(tmp_path):
    model = build(hidden_size=256, initializer_range=0.05)
    missing = {"lm_head.weight": 0.05, "model.layers.1.attn.q_proj.weight": 0.05, "model.embed_tokens.weight": 0.05}
    missing |= {"model.layers.0.attn.o_proj.weight": 0.025, "model.layers.1.mlp.down_proj.weight": 0.025}
    norm = "model.layers.0.attn.g_norm.weight"
    kept = {name: tensor for name, tensor in model.state_dict().items() if name not in {*missing, norm}}
    model.save_pretrained(tmp_path, state_dict=kept)
    loaded = LightNetForCausalLM.from_pretrained(tmp_path).state_dict()
    for name, std in missing.items():
        assert not torch.equal(loaded[name], model.state_dict()[name]), name
        assert loaded[name][1:].std().item() == pytest.approx(std, rel=0.05), name
    assert not loaded["model.embed_tokens.weight"][0].any()
    assert torch.equal(loaded[norm], torch.ones_like(loaded[norm]))
    assert all(torch.equal(loaded[name], tensor) for name, tensor in kept.items())


def greedy(model, input_ids, count):
    for _ in range(count):
        input_ids = torch.cat([input_ids, model(input_ids).logits[:, -1:].argmax(-1)], 1)
    return input_ids


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"prefill_chunk_size": 3}], ids=str)
def test_greedy_generation_is_the_argmax_of_the_whole(options):
    model, input_ids = build(), tokens(2, 7)
    generated = model.generate(
        input_ids, attention_mask=torch.ones_like(input_ids), max_new_tokens=8, do_sample=False, **options
    )
    assert torch.equal(generated, greedy(model, input_ids, 8))


@torch.no_grad()
def test_padded_rows_generate_what_they_generate_alone():
    model, input_ids = build(), tokens(2, 7)
    input_ids[1, :4] = 0
    generated = model.generate(input_ids, attention_mask=(input_ids != 0).long(), max_new_tokens=6, do_sample=False)
    assert torch.equal(generated[0], greedy(model, input_ids[:1], 6)[0])
    assert torch.equal(generated[1, 4:], greedy(model, input_ids[1:, 4:], 6)[0])


@torch.no_grad()
@pytest.mark.parametrize(
    "options", [{"do_sample": True}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}], ids=str
)
def test_sampling_and_beams_do_not_depend_on_the_cache(options):
    model, input_ids = build(), tokens(2, 7)
    generated = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        generated.append(
            model.generate(
                input_ids,
                attention_mask=torch.ones_like(input_ids),
                max_new_tokens=6,
                use_cache=use_cache,
                **options,
            )
        )
    assert torch.equal(*generated)


@torch.no_grad()
def test_generation_goes_on_from_a_cache():
    model, input_ids = build(), tokens(1, 7)
    first = model.generate(input_ids, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    cache = copy.deepcopy(first.past_key_values)
    second = model.generate(first.sequences, past_key_values=first.past_key_values, max_new_tokens=4, do_sample=False)
    expected = greedy(model, input_ids, 8)
    assert torch.equal(second, expected)
    # transformers looks for it before it runs ahead of the tokens that it returns.
    assert first.past_key_values._is_user_defined
    again = model.generate(first.sequences, past_key_values=cache, max_new_tokens=4, do_sample=False)
    assert torch.equal(again, expected)


@torch.no_grad()
@pytest.mark.parametrize(("position_encoding", "key_dim"), [(None, 8), ("lrpe", 16)])
def test_the_cache_does_not_grow(position_encoding, key_dim):
    model = build(position_encoding=position_encoding)
    sizes = {model(tokens(1, length)).past_key_values.nbytes for length in (1, 10, 300)}
    assert sizes == {2 * 4 * 2 * (key_dim + key_dim * 8)}  # layers, bytes, key heads


def test_cut_from_its_history_a_cache_gives_the_same_values():
    model, input_ids = build(), tokens(1, 12)
    before = model(input_ids[:, :6], use_cache=True).past_key_values
    cut = before.detach()
    assert before.layer(0).state.memory.requires_grad
    assert not any(tensor.requires_grad for layer in cut.layers for tensor in layer.state)
    after = model(input_ids[:, 6:], past_key_values=cut).logits
    assert_same(after, model(input_ids).logits[:, 6:])
    assert before.get_seq_length() == 6
    before.reset()
    assert (before.get_seq_length(), before.nbytes) == (0, 0)


def test_half_precision_and_float64():
    model, input_ids = build(), tokens(2, 9)
    expected = model(input_ids).logits
    double = copy.deepcopy(model).double()(input_ids).logits
    assert double.dtype == torch.float64
    assert_same(double.float(), expected)
    low = model.bfloat16()(input_ids)
    assert low.logits.dtype == torch.bfloat16
    assert low.past_key_values.layer(0).state.memory.dtype == torch.float32
    assert (low.logits.float() - expected).norm() < 0.05 * expected.norm()


def test_assisted_decoding_and_other_caches_are_refused():
    model, input_ids = build(), tokens(1, 7)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=61, eos_token_id=None, pad_token_id=0, **small))
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        model.generate(input_ids, assistant_model=llama, max_new_tokens=3)
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        model.generate(input_ids, prompt_lookup_num_tokens=2, max_new_tokens=3)
    with pytest.raises(ValueError, match="assistant_model: expected a model whose cache can give tokens back"):
        llama.generate(input_ids, assistant_model=model, max_new_tokens=3)
    for implementation in ("static", "offloaded", "quantized"):
        with pytest.raises(ValueError, match=f"cache_implementation: expected None.*got '{implementation}'"):
            model.generate(input_ids, cache_implementation=implementation, max_new_tokens=3)
    with pytest.raises(TypeError, match="past_key_values: expected a RecurrenceCache, got DynamicCache"):
        model(input_ids, past_key_values=DynamicCache())
    cache = model(input_ids).past_key_values
    with pytest.raises(NotImplementedError, match="crop: a recurrent state cannot give back tokens"):
        cache.crop(-1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_attention_heads": 5}, "num_attention_heads: expected a divisor of hidden_size = 32, got 5"),
        ({"num_key_value_heads": 3}, "num_key_value_heads: expected a divisor of num_attention_heads = 4, got 3"),
        ({"gate": "relu"}, "gate: expected one of sigmoid, swish, got 'relu'"),
        ({"position_encoding": "rope"}, "position_encoding: expected None or 'lrpe', got 'rope'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers: expected a whole number of at least 1, got 0"),
    ],
)
def test_bad_configs_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        LightNetConfig(**{**SIZES, **options})
