from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from sightline.reference import attention, attention_weights
from sightline.weighting import LSSA, LSSAR, Reweight, Softmax, Softplus


def weights_of_row(
    products: Sequence[float | None], weighting: Any, scale: float, bias: Sequence[float]
) -> list[float]:
    """Attention weights of a row from its products <q_i, k_j>, by MATH.md with Python floats.

    None stands for a key that the row does not see.
    With `normalize_qk` the products are those of the normalised vectors.
    """
    visible = [j for j, product in enumerate(products) if product is not None]
    n = len(visible)
    weights = [0.0] * len(products)
    if n == 0:
        return weights
    scores = {}
    for j in visible:
        score = scale * (math.log(n) if weighting.length_scale else 1.0) * products[j] + bias[j]
        cap = getattr(weighting, "softcap", None)
        scores[j] = cap * math.tanh(score / cap) if cap else score
    if weighting.kind == "softmax":
        largest = max(scores.values())
        f = {j: math.exp(score - largest) for j, score in scores.items()}
    else:
        f = {j: max(score, 0.0) + math.log1p(math.exp(-abs(score))) for j, score in scores.items()}
    z = math.fsum(f.values())
    a = {j: f[j] / z for j in visible}
    if weighting.reweight is not None:
        a = _reweighted(a, f, z, n, weighting.reweight)
    for j in visible:
        weights[j] = a[j]
    return weights


def _reweighted(a: dict[int, float], f: dict[int, float], z: float, n: int, reweight: Any) -> dict[int, float]:
    offset = reweight.offset if n > reweight.exempt_rows else 0.0
    mean = offset * z / n
    peak = max(f.values()) - mean
    if offset > 0 and peak <= 2.0**-16 * max(f.values()):
        return a
    sharp = {j: (max(f[j] - mean, 0.0) / peak) ** reweight.power for j in f}
    total = math.fsum(sharp.values())
    return {j: sharp[j] / total for j in f}


def visible_by_definition(row: int, key: int, queries: int, length: int, options: dict[str, Any]) -> bool:
    position = row + length - queries
    left, right = options.get("window") or (None, None)
    return (
        key < length
        and not (options.get("causal") and key > position)
        and not (left is not None and key < position - left)
        and not (right is not None and key > position + right)
    )


def attention_by_definition(
    query: Tensor, key: Tensor, value: Tensor, weighting: Any, options: dict[str, Any]
) -> Tensor:
    """Output of every row from `weights_of_row`, one pair (i, j) at a time."""
    (batch, heads, queries, width), (key_heads, keys) = query.shape, key.shape[1:3]
    output = torch.zeros(batch, heads, queries, value.shape[3], dtype=torch.float64)
    default_scale = math.log(width) if weighting.normalize_qk else 1 / math.sqrt(width)
    for b in range(batch):
        length = keys if options.get("key_lengths") is None else int(options["key_lengths"][b])
        for h in range(heads):
            scale = options.get("scale", default_scale)
            scale = float(scale[h]) if isinstance(scale, Tensor) else scale
            for i in range(queries):
                products: list[float | None] = []
                bias = []
                for j in range(keys):
                    q, k = query[b, h, i], key[b, h // (heads // key_heads), j]
                    product = math.fsum((q * k).tolist())
                    if weighting.normalize_qk:
                        product /= math.hypot(*q.tolist()) * math.hypot(*k.tolist())
                    seen = visible_by_definition(i, j, queries, length, options)
                    entry = 0.0
                    if options.get("key_mask") is not None:
                        seen = seen and bool(options["key_mask"][b, j])
                    if options.get("attn_mask") is not None:
                        mask = options["attn_mask"].expand(batch, heads, queries, keys)[b, h, i, j]
                        seen = seen and (bool(mask) if mask.dtype == torch.bool else float(mask) != -math.inf)
                        entry += 0.0 if mask.dtype == torch.bool or not seen else float(mask)
                    if options.get("alibi_slopes") is not None:
                        entry -= float(options["alibi_slopes"][h]) * abs(i + length - queries - j)
                    products.append(product if seen else None)
                    bias.append(entry)
                weights = torch.tensor(weights_of_row(products, weighting, scale, bias), dtype=torch.float64)
                output[b, h, i] = weights @ value[b, h // (heads // key_heads)]
    return output


def mask_with_hidden_entries() -> Tensor:
    mask = torch.randn(2, 4, 7, 9, dtype=torch.float64)
    return mask.masked_fill(torch.rand(mask.shape) < 0.3, -torch.inf)


OPTIONS = {
    "plain": dict,
    "causal": lambda: {"causal": True},
    "window": lambda: {"window": (2, 1)},
    "left_window": lambda: {"window": (3, None)},
    "right_window": lambda: {"window": (None, 0)},
    "causal_window": lambda: {"causal": True, "window": (2, 5)},
    "lengths": lambda: {"causal": True, "key_lengths": torch.tensor([9, 5])},
    "empty_length": lambda: {"key_lengths": torch.tensor([0, 4])},
    "key_mask": lambda: {"key_mask": torch.rand(2, 9) < 0.6},
    "bool_mask": lambda: {"attn_mask": torch.rand(7, 9) < 0.5},
    "mask_of_heads": lambda: {"attn_mask": torch.rand(4, 1, 9) < 0.7, "causal": True},
    "float_mask": lambda: {"attn_mask": mask_with_hidden_entries()},
    "row_mask": lambda: {"attn_mask": torch.randn(1, 1, 7, 1, dtype=torch.float64)},
    "alibi": lambda: {"causal": True, "alibi_slopes": torch.tensor([0.5, 0.25, 0.125, 0.0], dtype=torch.float64)},
    "number_scale": lambda: {"scale": 0.3},
    "negative_scale": lambda: {"scale": -1.7},
    "zero_scale": lambda: {"scale": 0.0},
    "scale_of_heads": lambda: {"scale": torch.rand(4, dtype=torch.float64)},
}
every_option = pytest.mark.parametrize("option", OPTIONS.values(), ids=OPTIONS.keys())


@every_option
def test_attention_equals_the_formulas_taken_row_by_row(random_inputs: Any, weighting: Any, option: Any) -> None:
    query, key, value = random_inputs()
    options = option()
    output, _ = attention(query, key, value, weighting=weighting, **options)
    expected = attention_by_definition(query, key, value, weighting, options)
    torch.testing.assert_close(output, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("queries", [1, 5, 9])
def test_softmax_equals_sdpa_with_the_mask_aligned_at_the_end(random_inputs: Any, queries: int) -> None:
    query, key, value = random_inputs(queries)
    aligned = torch.ones(queries, 9, dtype=torch.bool).tril(9 - queries)
    expected = scaled_dot_product_attention(query, key, value, aligned, enable_gqa=True)
    output, _ = attention(query, key, value, weighting=Softmax(), causal=True)
    torch.testing.assert_close(output, expected)


def test_softmax_with_float_mask_and_scale_equals_sdpa(random_inputs: Any) -> None:
    query, key, value = random_inputs()
    mask = torch.randn(2, 4, 7, 9, dtype=torch.float64)
    expected = scaled_dot_product_attention(query, key, value, mask, scale=0.7, enable_gqa=True)
    output, _ = attention(query, key, value, weighting=Softmax(), attn_mask=mask, scale=0.7)
    torch.testing.assert_close(output, expected)


def test_softmax_of_a_row_masked_with_the_smallest_number_everywhere_is_a_softmax(random_inputs: Any) -> None:
    query, key, value = (tensor.float() for tensor in random_inputs())
    mask = torch.zeros(7, 9)
    mask[3] = torch.finfo(torch.float32).min
    output, log_normalizer = attention(query, key, value, weighting=Softmax(), attn_mask=mask)
    expected = scaled_dot_product_attention(query, key, value, mask, enable_gqa=True)
    torch.testing.assert_close(output, expected)
    assert log_normalizer.isfinite().all()


def test_log_normalizer_of_softmax_is_logsumexp_of_the_scores(random_inputs: Any) -> None:
    query, key, value = random_inputs(key_heads=4)
    _, log_normalizer = attention(query, key, value, weighting=Softmax(), scale=1.0)
    torch.testing.assert_close(log_normalizer, torch.logsumexp(query @ key.mT, -1))


def test_log_normalizer_of_softplus_is_the_log_of_the_sum_also_under_reweighting(random_inputs: Any) -> None:
    query, key, value = random_inputs(key_heads=4)
    scores = query @ key.mT * 0.5
    expected = torch.nn.functional.softplus(scores, threshold=1e9).sum(-1).log()
    for reweight in (None, Reweight()):
        weighting = Softplus(length_scale=False, normalize_qk=False, reweight=reweight)
        _, log_normalizer = attention(query, key, value, weighting=weighting, scale=0.5)
        torch.testing.assert_close(log_normalizer, expected)


def test_sink_acts_like_a_key_whose_score_is_the_sink_and_whose_value_is_zero(random_inputs: Any) -> None:
    query, key, value = random_inputs(key_heads=4, batch=1)
    sinks = torch.tensor([-2.0, 0.0, 1.0, 40.0], dtype=torch.float64)
    scores = torch.cat([query @ key.mT, sinks.view(1, 4, 1, 1).expand(1, 4, 7, 1)], -1)
    output, log_normalizer = attention(query, key, value, weighting=Softmax(), sinks=sinks, scale=1.0)
    torch.testing.assert_close(output, scores.softmax(-1)[..., :-1] @ value)
    torch.testing.assert_close(log_normalizer, scores.logsumexp(-1))


def test_sink_is_neither_capped_nor_scaled(random_inputs: Any) -> None:
    query, key, value = random_inputs(key_heads=4, batch=1)
    sinks = torch.full((4,), 9.0, dtype=torch.float64)
    capped = 2 * torch.tanh(query @ key.mT * 0.5 / 2)
    scores = torch.cat([capped, sinks.view(1, 4, 1, 1).expand(1, 4, 7, 1)], -1)
    output, _ = attention(query, key, value, weighting=Softmax(softcap=2.0), sinks=sinks, scale=0.5)
    torch.testing.assert_close(output, scores.softmax(-1)[..., :-1] @ value)


@pytest.mark.parametrize("power", [1.0, 3.0, 15.0])
def test_kernel_form_of_reweighting_equals_the_form_in_the_paper(random_inputs: Any, power: float) -> None:
    query, key, value = random_inputs(40, 40)
    kernel, normalizer = attention(query, key, value, weighting=LSSAR(power), causal=True)
    literal, literal_normalizer = attention(query, key, value, weighting=LSSAR(power), causal=True, literal=True)
    torch.testing.assert_close(kernel, literal, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(normalizer, literal_normalizer)


def test_kernel_form_survives_in_float32_where_the_paper_form_overflows() -> None:
    query, key, value = torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 4096, 4), torch.randn(1, 1, 4096, 2)
    query[..., 0] = 1.0
    key[..., 0] = -1.0
    key[0, 0, 77, 0] = 1.0
    output, _ = attention(query, key, value, weighting=LSSAR(), scale=20.0)
    literal, _ = attention(query, key, value, weighting=LSSAR(), scale=20.0, literal=True)
    torch.testing.assert_close(output[0, 0, 0], value[0, 0, 77])
    assert not literal.isfinite().all()


def test_rows_that_see_at_most_exempt_rows_keys_keep_offset_zero(random_inputs: Any) -> None:
    query, key, value = random_inputs(6, 6)
    output, _ = attention(query, key, value, weighting=Softplus(reweight=Reweight(3.0, exempt_rows=4)), causal=True)
    exempt, _ = attention(query, key, value, weighting=Softplus(reweight=Reweight(3.0, offset=0.0)), causal=True)
    assert torch.equal(output[:, :, :4], exempt[:, :, :4])
    assert not torch.allclose(output[:, :, 4:], exempt[:, :, 4:])


def test_chosen_rows_equal_the_same_rows_of_the_whole(random_inputs: Any, weighting: Any) -> None:
    query, key, value = random_inputs()
    rows = torch.tensor([6, 0, 3, 3])
    options: dict[str, Any] = {
        "weighting": weighting,
        "causal": True,
        "window": (4, None),
        "key_lengths": torch.tensor([8, 9]),
        "attn_mask": torch.randn(7, 9, dtype=torch.float64),
        "alibi_slopes": torch.rand(4, dtype=torch.float64),
    }
    dropout = {"dropout_p": 0.4, "dropout_seed": torch.tensor([11])}
    whole = attention(query, key, value, **options, **dropout)
    chosen = attention(query, key, value, **options, **dropout, rows=rows)
    for all_rows, some_rows in zip(whole, chosen, strict=True):
        torch.testing.assert_close(some_rows, all_rows[:, :, rows])
    weights, _ = attention_weights(query, key, **options)
    some_weights, _ = attention_weights(query, key, **options, rows=rows)
    torch.testing.assert_close(some_weights, weights[:, :, rows])


def test_weights_sum_to_one_and_are_zero_where_nothing_is_visible(random_inputs: Any, weighting: Any) -> None:
    query, key, _ = random_inputs()
    weights, log_normalizer = attention_weights(
        query, key, weighting=weighting, causal=True, key_lengths=torch.tensor([9, 3])
    )
    sums = weights.sum(-1)
    torch.testing.assert_close(sums[0], torch.ones_like(sums[0]))
    assert (sums[1, :, :4] == 0).all()
    assert (log_normalizer[1, :, :4] == -torch.inf).all()
    torch.testing.assert_close(sums[1, :, 4:], torch.ones_like(sums[1, :, 4:]))


PACKINGS = {
    "equal": ([0, 4, 9], [0, 4, 9]),
    "longer_keys": ([0, 2, 5, 6], [0, 4, 4 + 3, 13]),
    "empty_documents": ([0, 0, 3, 3, 6], [0, 2, 7, 7, 8]),
    "document_without_keys": ([0, 3, 6], [0, 0, 5]),
    "one": ([0, 6], [0, 9]),
}


@pytest.mark.parametrize("packing", PACKINGS.values(), ids=PACKINGS.keys())
@pytest.mark.parametrize("window", [None, (2, 1)])
def test_packed_documents_equal_separate_calls(
    random_inputs: Any, weighting: Any, packing: tuple[list[int], list[int]], window: Any
) -> None:
    offsets_q, offsets_k = packing
    # Two more rows and three more keys than the documents hold: they belong to nothing.
    query, key, value = random_inputs(offsets_q[-1] + 2, offsets_k[-1] + 3, batch=1)
    options: dict[str, Any] = {
        "weighting": weighting,
        "causal": True,
        "window": window,
        "alibi_slopes": torch.rand(4, dtype=torch.float64),
    }
    cu_seqlens_q, cu_seqlens_k = (torch.tensor(offsets, dtype=torch.int32) for offsets in packing)
    output, log_normalizer = attention(
        query, key, value, **options, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k
    )
    for document in range(len(offsets_q) - 1):
        of_query = slice(*offsets_q[document : document + 2])
        of_key = slice(*offsets_k[document : document + 2])
        alone = attention(query[:, :, of_query], key[:, :, of_key], value[:, :, of_key], **options)
        torch.testing.assert_close(output[:, :, of_query], alone[0])
        torch.testing.assert_close(log_normalizer[:, :, of_query], alone[1])
    assert (output[:, :, offsets_q[-1] :] == 0).all()
    assert (log_normalizer[:, :, offsets_q[-1] :] == -torch.inf).all()


def test_offsets_without_any_document_leave_every_row_empty(random_inputs: Any) -> None:
    query, key, value = random_inputs(batch=1)
    none = torch.zeros(1, dtype=torch.int32)
    output, _ = attention(query, key, value, weighting=LSSA(), cu_seqlens_q=none, cu_seqlens_k=none)
    assert (output == 0).all()


@pytest.mark.parametrize(("queries", "keys"), [(0, 5), (4, 0), (0, 0)])
def test_no_queries_and_no_keys_work(random_inputs: Any, weighting: Any, queries: int, keys: int) -> None:
    leaves = [tensor.requires_grad_() for tensor in random_inputs(queries, keys)]
    output, log_normalizer = attention(*leaves, weighting=weighting, causal=True)
    assert output.shape == (2, 4, queries, 3)
    assert (output == 0).all()
    assert (log_normalizer == -torch.inf).all()
    (output.sum() + torch.where(log_normalizer.isfinite(), log_normalizer, 0).sum()).backward()
    assert all(leaf.grad is not None and leaf.grad.isfinite().all() for leaf in leaves)


def test_values_of_one_give_outputs_of_one_and_key_order_does_not_matter(random_inputs: Any, weighting: Any) -> None:
    query, key, value = random_inputs()
    ones, _ = attention(query, key, torch.ones_like(value), weighting=weighting)
    torch.testing.assert_close(ones, torch.ones_like(ones))
    order = torch.randperm(9)
    torch.testing.assert_close(
        attention(query, key[:, :, order], value[:, :, order], weighting=weighting),
        attention(query, key, value, weighting=weighting),
    )
