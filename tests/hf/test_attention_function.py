"""The attention function: what it takes from a model, what it replaces, what it refuses."""

from __future__ import annotations

import warnings

import pytest
import torch
from hf.families import FAMILIES, families, output
from torch import nn
from transformers import masking_utils
from transformers.models.llama import modeling_llama

import sightline as sl
from sightline.hf import attention as attention_module
from sightline.hf import attention_forward, interface, sightline_mask, write_settings

BY_NAME = {family.name: family for family in FAMILIES}


class Settings:
    def __init__(self, weighting=None):
        self.sightline = None if weighting is None else write_settings(weighting)


def layer(weighting=None, is_causal=True):
    module = nn.Identity()
    module.config, module.is_causal = Settings(weighting), is_causal
    return module


def states(queries=6, keys=6, batch=2):
    return torch.randn(batch, 4, queries, 8), torch.randn(batch, 2, keys, 8), torch.randn(batch, 2, keys, 8)


def test_output_has_the_layout_that_models_merge_heads_from():
    result, statistics = attention_forward(layer(), *states(), None)
    assert result.shape == (2, 6, 4, 8)
    assert result.is_contiguous()
    assert statistics is None


def test_statistics_in_the_place_of_weights():
    query, key, value = states()
    _, statistics = attention_forward(layer(), query, key, value, None, output_attentions=True)
    _, expected = sl.attention(query, key, value, causal=True, observe=sl.Observe(log_normalizer=True))
    assert torch.equal(statistics.log_normalizer, expected.log_normalizer)


def packed_mask():
    """Two entries of 9 tokens: one document, and two."""
    positions = torch.stack([torch.arange(9), torch.cat([torch.arange(4), torch.arange(5)])])
    function = masking_utils.packed_sequence_compatibility_function(
        masking_utils.causal_mask_function, positions, masking_utils.find_packed_sequence_indices(positions)
    )
    return sightline_mask(2, 9, 9, mask_function=function)


def test_statistics_of_packed_batches_have_the_shape_of_the_batch():
    query, key, value = states(9, 9)
    mask = packed_mask()
    result, statistics = attention_forward(layer(), query, key, value, mask, output_attentions=True)
    dense = {"attn_mask": mask.dense()}
    expected, rows = sl.attention(query, key, value, observe=sl.Observe(log_normalizer=True), **dense)
    torch.testing.assert_close(result, expected.transpose(1, 2), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(statistics.log_normalizer, rows.log_normalizer, rtol=1e-4, atol=1e-5)


def test_position_bias_of_packed_batches():
    query, key, value = states(9, 9)
    bias = torch.randn(1, 4, 9, 9)
    mask = packed_mask()
    result, _ = attention_forward(layer(), query, key, value, mask, position_bias=bias)
    expected = sl.attention(query, key, value, attn_mask=bias.masked_fill(~mask.dense(), -torch.inf))
    torch.testing.assert_close(result, expected.transpose(1, 2), rtol=1e-4, atol=1e-5)


@families("decoder", "encoder", without=("gpt2",))  # GPT-2 keeps the flag to itself
def test_models_return_statistics_where_they_forward_the_flag(family):
    model, inputs = sl.swap_attention(family.model(), sl.Softmax()), family.inputs()
    with torch.no_grad():
        found = model(**inputs, output_attentions=True).attentions
    assert len(found) == 2
    for statistics in found:
        assert isinstance(statistics, sl.AttentionStats)
        assert statistics.log_normalizer.isfinite().all()


def test_missing_mask_follows_the_module():
    query, key, value = states()
    causal, _ = attention_forward(layer(), query, key, value, None)
    whole, _ = attention_forward(layer(is_causal=False), query, key, value, None)
    told, _ = attention_forward(layer(), query, key, value, None, is_causal=False)
    assert torch.equal(causal, sl.attention(query, key, value, causal=True).transpose(1, 2))
    assert torch.equal(whole, sl.attention(query, key, value).transpose(1, 2))
    assert torch.equal(told, whole)


def test_missing_mask_of_cross_attention_hides_nothing():
    class TextCrossAttention(nn.Identity):  # says nothing of causality
        config = Settings()

    module = TextCrossAttention()
    query, key, value = states()
    result, _ = attention_forward(module, query, key, value, None)
    assert torch.equal(result, sl.attention(query, key, value).transpose(1, 2))
    result, _ = attention_forward(module, query[:, :, :2], key, value, None)
    assert torch.equal(result, sl.attention(query[:, :, :2], key, value).transpose(1, 2))


def test_missing_mask_of_a_single_query_sees_everything():
    query, key, value = states(queries=1)
    result, _ = attention_forward(layer(), query, key, value, None)
    torch.testing.assert_close(result, sl.attention(query, key, value).transpose(1, 2))


def test_missing_mask_that_could_mean_two_things_is_refused():
    with pytest.raises(ValueError, match="attention_mask: expected a mask for 3 queries and 6 keys"):
        attention_forward(layer(), *states(queries=3), None)
    with pytest.raises(ValueError, match="attention_mask: expected a mask with the window of 4 keys"):
        attention_forward(layer(), *states(), None, sliding_window=4)


def test_position_bias_without_a_mask():
    query, key, value = states()
    bias = torch.randn(1, 4, 6, 6)
    result, _ = attention_forward(layer(), query, key, value, None, position_bias=bias)
    assert torch.equal(result, sl.attention(query, key, value, causal=True, attn_mask=bias).transpose(1, 2))


def test_softcap_that_changes_is_taken():
    module, (query, key, value) = layer(), states()
    for softcap in (0.5, None, 2.0):
        result, _ = attention_forward(module, query, key, value, None, softcap=softcap)
        expected = sl.attention(query, key, value, causal=True, weighting=sl.Softmax(softcap=softcap))
        assert torch.equal(result, expected.transpose(1, 2))


def test_packed_documents_in_a_static_cache_are_refused():
    mask = sightline_mask(1, 4, 6, q_offset=torch.tensor(1))
    offsets = torch.tensor([0, 2, 4], dtype=torch.int32)
    with pytest.raises(ValueError, match="key_lengths: expected None with packed documents"):
        attention_forward(layer(), *states(4, 6, batch=1), mask, cu_seq_lens_q=offsets)


def test_mask_of_other_lengths_is_refused():
    mask = sightline_mask(2, 6, 9)
    with pytest.raises(ValueError, match="attention_mask: expected 6 queries and 6 keys as in Identity"):
        attention_forward(layer(), *states(), mask)


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (
            torch.ones(2, 1, 6, 6, dtype=torch.long),
            TypeError,
            "expected a bool or float mask in Identity, got torch.int64",
        ),
        ("causal", TypeError, "expected a bool or float mask in Identity, got str"),
        (torch.ones(2, 6, dtype=torch.bool), ValueError, r"expected 4 axes \(B, 1 or H, M, N\) in Identity, got shape"),
    ],
    ids=["integers", "text", "two axes"],
)
def test_masks_that_cannot_be_understood_are_refused(mask, error, message):
    with pytest.raises(error, match=f"attention_mask: {message}"):
        attention_forward(layer(), *states(), mask)


def test_lowest_numbers_hide_keys_and_others_do_not():
    query, key, value = states()
    bias = torch.randn(2, 1, 6, 6)
    hidden = torch.rand(2, 1, 6, 6) > 0.6
    lowest = torch.finfo(torch.float32).min
    module = layer(sl.LSSA())
    result, _ = attention_forward(module, query, key, value, bias.masked_fill(hidden, lowest))
    expected = sl.attention(query, key, value, weighting=sl.LSSA(), attn_mask=bias.masked_fill(hidden, -torch.inf))
    assert torch.equal(result, expected.transpose(1, 2))
    result, _ = attention_forward(module, query, key, value, bias.masked_fill(hidden, -1e4))
    expected = sl.attention(query, key, value, weighting=sl.LSSA(), attn_mask=bias.masked_fill(hidden, -1e4))
    assert torch.equal(result, expected.transpose(1, 2))


def test_finite_bias_under_a_softcap_is_refused():
    with pytest.raises(NotImplementedError, match="attention_mask: expected a bool mask in Identity, whose softcap"):
        attention_forward(layer(), *states(), torch.randn(2, 1, 6, 6), softcap=5.0)


def test_softplus_says_once_what_it_replaces(monkeypatch):
    monkeypatch.setattr(attention_module, "_warned_types", set())
    with pytest.warns(UserWarning, match="replaces the model's softmax and with it its scaling, softcap, sinks"):
        attention_forward(layer(sl.LSSA()), *states(), None, scaling=0.7, softcap=5.0, s_aux=torch.zeros(4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attention_forward(layer(sl.LSSA()), *states(), None, scaling=0.7, softcap=5.0, s_aux=torch.zeros(4))


def test_normalised_softmax_says_that_it_replaces_the_scale(monkeypatch):
    monkeypatch.setattr(attention_module, "_warned_types", set())
    with pytest.warns(UserWarning, match="replaces the model's softmax and with it its scaling"):
        attention_forward(layer(sl.Softmax(normalize_qk=True)), *states(), None, scaling=0.7)


def test_usual_scaling_is_replaced_without_a_word(monkeypatch):
    monkeypatch.setattr(attention_module, "_warned_types", set())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attention_forward(layer(sl.LSSA()), *states(), None, scaling=8**-0.5)


def test_softmax_keeps_its_own_softcap_and_normalised_scale():
    query, key, value = states()
    capped, _ = attention_forward(layer(sl.Softmax(softcap=1.0)), query, key, value, None, softcap=5.0)
    expected = sl.attention(query, key, value, causal=True, weighting=sl.Softmax(softcap=1.0))
    torch.testing.assert_close(capped, expected.transpose(1, 2))
    normalised = sl.Softmax(normalize_qk=True)
    result, _ = attention_forward(layer(normalised), query, key, value, None, scaling=8**-0.5)
    expected = sl.attention(query, key, value, causal=True, weighting=normalised)
    torch.testing.assert_close(result, expected.transpose(1, 2))


def test_changed_settings_are_read_again():
    module, heads = layer(sl.LSSA()), states()
    first, _ = attention_forward(module, *heads, None)
    module.config.sightline["weighting"] = sl.Softmax().to_dict()
    second, _ = attention_forward(module, *heads, None)
    assert torch.equal(second, sl.attention(*heads, causal=True).transpose(1, 2))
    assert not torch.equal(first, second)


def test_arguments_that_change_the_result_are_refused():
    model = BY_NAME["t5"].model()
    block = model.encoder.block[0].layer[0].SelfAttention
    with pytest.raises(NotImplementedError, match=r"paged cache .* T5Attention, got object"):
        attention_forward(block, *states(), None, cache=object())
    with pytest.raises(NotImplementedError, match="relative_bias: Identity passes this argument to its attention"):
        attention_forward(layer(), *states(), None, relative_bias=torch.ones(1))


def test_arguments_that_eager_attention_ignores_are_ignored():
    family = BY_NAME["llama"]
    model, inputs = sl.swap_attention(family.model(), sl.Softmax()), family.inputs()
    with torch.no_grad():
        assert torch.equal(output(model, **inputs, anything_else=3), output(model, **inputs))


def test_argument_of_the_eager_attention_that_is_not_known_here_is_refused(monkeypatch):
    family = BY_NAME["llama"]
    model, inputs = sl.swap_attention(family.model(), sl.Softmax()), family.inputs()

    def eager_attention_forward(module, query, key, value, attention_mask, tilt=None, **kwargs):
        raise AssertionError("not called")

    monkeypatch.setattr(modeling_llama, "eager_attention_forward", eager_attention_forward)
    monkeypatch.setattr(interface, "_parameters", {})
    with pytest.raises(NotImplementedError, match="tilt: LlamaAttention passes this argument"):
        output(model, **inputs, tilt=3)


def one_row(width=8):
    return torch.randn(2, 4, 1, width), torch.randn(2, 2, 6, width), torch.randn(2, 2, 6, width)


@torch.no_grad()
def test_a_new_token_is_refused_what_many_are():
    mask = sightline_mask(2, 1, 6, q_offset=5)
    with pytest.raises(ValueError, match="scale"):
        attention_forward(layer(), *one_row(), mask, scaling=float("inf"))
    with pytest.raises(ValueError, match=r"ln\(D\)"):
        attention_forward(layer(sl.LSSA()), *one_row(width=1), mask)
    with pytest.raises(NotImplementedError, match="sinks"):
        attention_forward(layer(sl.Softmax(reweight=sl.Reweight())), *one_row(), mask, s_aux=torch.zeros(4))
