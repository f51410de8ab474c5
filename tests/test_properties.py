"""What must hold of attention and recurrence whatever the numbers (Hypothesis chooses sizes, options and seeds)."""

from __future__ import annotations

import itertools
from typing import Any

import recurrence_cases
import torch
from attention_cases import WEIGHTINGS, Sizes, random_inputs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import sightline as sl

# With CI=true Hypothesis would draw the same examples every time.
modest = settings(deadline=None, max_examples=30, derandomize=False, suppress_health_check=[HealthCheck.too_slow])

weightings = st.sampled_from(list(WEIGHTINGS.values()))
seeds = st.integers(0, 2**31)
lengths = st.integers(1, 140)


@st.composite
def problem_sizes(draw: st.DrawFn, **fixed: Any) -> Sizes:
    key_heads = draw(st.integers(1, 3))
    chosen = {
        "batch": draw(st.integers(1, 2)),
        "heads": key_heads * draw(st.integers(1, 3)),
        "key_heads": key_heads,
        "queries": draw(lengths),
        "keys": draw(lengths),
        "width": draw(st.integers(2, 40)),
        "value_width": draw(st.integers(1, 40)),
    }
    return Sizes(**{**chosen, **fixed})


def drawn(sizes: Sizes, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(seed)
    return random_inputs(sizes)


def attend(query: Tensor, key: Tensor, value: Tensor, weighting: Any, **options: Any) -> tuple[Tensor, Tensor]:
    output, stats = sl.attention(
        query, key, value, weighting=weighting, observe=sl.Observe(log_normalizer=True), backend="native", **options
    )
    return output, stats.log_normalizer


def assert_same(actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], weighting: Any) -> None:
    # Another order of summation; re-weighting raises its rounding to a power.
    tolerance = 2e-5 if weighting.reweight is None else 2e-3
    torch.testing.assert_close(actual[0], expected[0], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(actual[1], expected[1], rtol=1e-5, atol=1e-5)


@modest
@given(problem_sizes(), weightings, seeds, st.booleans())
def test_values_of_one_give_one(sizes: Sizes, weighting: Any, seed: int, causal: bool) -> None:
    query, key, value = drawn(sizes, seed)
    mask = torch.rand(sizes.scores()) < 0.7
    output, log_normalizer = attend(query, key, torch.ones_like(value), weighting, causal=causal, attn_mask=mask)
    sees_something = log_normalizer > -torch.inf
    torch.testing.assert_close(output, sees_something[..., None].expand_as(output).float(), rtol=0, atol=1e-6)


@modest
@given(
    problem_sizes(keys=140),
    st.sampled_from(
        [sl.Softmax(), sl.Softmax(softcap=2.0), sl.Softplus(False, False), sl.Softplus(length_scale=False)]
    ),
    seeds,
    st.lists(st.integers(0, 140), max_size=3),
)
def test_splitting_the_keys_and_merging_gives_the_whole(
    sizes: Sizes, weighting: Any, seed: int, cuts: list[int]
) -> None:
    query, key, value = drawn(sizes, seed)
    edges = [0, *sorted(cuts), 140]
    parts = [
        attend(query, key[:, :, begin:end], value[:, :, begin:end], weighting)
        for begin, end in itertools.pairwise(edges)
    ]
    shares = torch.stack([log_normalizer for _, log_normalizer in parts])
    output = (torch.stack([output for output, _ in parts]) * shares.softmax(0)[..., None]).sum(0)
    assert_same((output, shares.logsumexp(0)), attend(query, key, value, weighting), weighting)


@modest
@given(problem_sizes(), weightings, seeds)
def test_permuting_the_keys_changes_nothing_without_causality(sizes: Sizes, weighting: Any, seed: int) -> None:
    query, key, value = drawn(sizes, seed)
    key_mask = torch.rand(sizes.batch, sizes.keys) < 0.8
    attn_mask = torch.randn(sizes.heads, 1, sizes.keys)
    order = torch.randperm(sizes.keys)
    plain = attend(query, key, value, weighting, key_mask=key_mask, attn_mask=attn_mask)
    permuted = attend(
        query,
        key[:, :, order],
        value[:, :, order],
        weighting,
        key_mask=key_mask[:, order],
        attn_mask=attn_mask[..., order],
    )
    assert_same(permuted, plain, weighting)


@modest
@given(problem_sizes(), weightings, seeds, lengths, st.booleans(), st.sampled_from(["key_mask", "key_lengths"]))
def test_padding_with_masked_keys_changes_nothing(
    sizes: Sizes, weighting: Any, seed: int, padding: int, causal: bool, by: str
) -> None:
    query, key, value = drawn(sizes, seed)
    longer = sizes.keys + padding
    padded_key = torch.cat([key, 100 * torch.randn(sizes.batch, sizes.key_heads, padding, sizes.width)], 2)
    padded_value = torch.cat([value, 100 * torch.randn(sizes.batch, sizes.key_heads, padding, sizes.value_width)], 2)
    if by == "key_lengths":
        options: dict[str, Any] = {"key_lengths": torch.full((sizes.batch,), sizes.keys), "causal": causal}
    else:
        # Positions count from the last key: without causality they mean nothing.
        options = {"key_mask": (torch.arange(longer) < sizes.keys).expand(sizes.batch, -1)}
    plain = attend(query, key, value, weighting, causal=causal if by == "key_lengths" else False)
    assert_same(attend(query, padded_key, padded_value, weighting, **options), plain, weighting)


@modest
@given(problem_sizes(), weightings, seeds, lengths, st.booleans())
def test_left_padding_changes_nothing(sizes: Sizes, weighting: Any, seed: int, padding: int, with_window: bool) -> None:
    query, key, value = drawn(sizes, seed)
    options: dict[str, Any] = {"causal": True, "window": (30, None) if with_window else None}
    padded_key = torch.cat([100 * torch.randn(sizes.batch, sizes.key_heads, padding, sizes.width), key], 2)
    padded_value = torch.cat([100 * torch.randn(sizes.batch, sizes.key_heads, padding, sizes.value_width), value], 2)
    key_mask = (torch.arange(sizes.keys + padding) >= padding).expand(sizes.batch, -1)
    padded = attend(query, padded_key, padded_value, weighting, key_mask=key_mask, **options)
    assert_same(padded, attend(query, key, value, weighting, **options), weighting)


@modest
@given(problem_sizes(), weightings, seeds, st.data())
def test_a_row_does_not_depend_on_other_rows(sizes: Sizes, weighting: Any, seed: int, data: st.DataObject) -> None:
    query, key, value = drawn(sizes, seed)
    row = data.draw(st.integers(0, sizes.queries - 1))
    others = torch.randn_like(query)
    others[:, :, row] = query[:, :, row]
    output, log_normalizer = attend(query, key, value, weighting, causal=True)
    other_output, other_log_normalizer = attend(others, key, value, weighting, causal=True)
    assert torch.equal(other_output[:, :, row], output[:, :, row])
    assert torch.equal(other_log_normalizer[:, :, row], log_normalizer[:, :, row])


@modest
@given(
    problem_sizes(), st.sampled_from([sl.LSSA(), sl.LSSAR(), sl.Softmax(normalize_qk=True)]), seeds, st.integers(-8, 8)
)
def test_lengths_of_query_and_key_mean_nothing_where_they_are_normalised(
    sizes: Sizes, weighting: Any, seed: int, exponent: int
) -> None:
    query, key, value = drawn(sizes, seed)
    factors = 2.0 ** torch.randint(-3, 3, (sizes.batch, sizes.key_heads, sizes.keys, 1))
    scaled = attend(query * 2.0**exponent, key * factors, value, weighting, causal=True)
    assert_same(scaled, attend(query, key, value, weighting, causal=True), weighting)


@modest
@given(problem_sizes(), weightings, seeds, st.booleans())
def test_weights_of_attention_rows_reproduce_attention(sizes: Sizes, weighting: Any, seed: int, causal: bool) -> None:
    query, key, value = drawn(sizes, seed)
    rows = torch.randint(sizes.queries, (5,))
    key_mask = torch.rand(sizes.batch, sizes.keys) < 0.8
    weights = sl.attention_rows(query, key, rows, weighting=weighting, causal=causal, key_mask=key_mask)
    expected = weights @ value.repeat_interleave(sizes.heads // sizes.key_heads, dim=1)
    output, log_normalizer = attend(query, key, value, weighting, causal=causal, key_mask=key_mask)
    assert_same((output[:, :, rows], log_normalizer), (expected, log_normalizer), weighting)


@modest
@given(problem_sizes(batch=1), weightings, seeds, st.booleans(), st.data())
def test_packed_documents_equal_separate_calls(
    sizes: Sizes, weighting: Any, seed: int, causal: bool, data: st.DataObject
) -> None:
    query, key, value = drawn(sizes, seed)
    documents = data.draw(st.integers(1, 4))

    def offsets(length: int) -> list[int]:
        return [0, *sorted(data.draw(st.integers(0, length)) for _ in range(documents - 1)), length]

    in_queries, in_keys = offsets(sizes.queries), offsets(sizes.keys)
    options: dict[str, Any] = {"causal": causal, "window": (25, None)}
    packed = attend(
        query,
        key,
        value,
        weighting,
        cu_seqlens_q=torch.tensor(in_queries, dtype=torch.int32),
        cu_seqlens_k=torch.tensor(in_keys, dtype=torch.int32),
        **options,
    )
    separate = []
    for document in range(documents):
        of_queries = slice(in_queries[document], in_queries[document + 1])
        of_keys = slice(in_keys[document], in_keys[document + 1])
        separate.append(attend(query[:, :, of_queries], key[:, :, of_keys], value[:, :, of_keys], weighting, **options))
    outputs, log_normalizers = zip(*separate, strict=True)
    assert_same(packed, (torch.cat(outputs, 2), torch.cat(log_normalizers, 2)), weighting)


@st.composite
def recurrences(draw: st.DrawFn, **options: Any) -> recurrence_cases.Problem:
    key_heads = draw(st.integers(1, 3))
    sizes = recurrence_cases.Sizes(
        batch=draw(st.integers(1, 2)),
        heads=key_heads * draw(st.integers(1, 5)),
        key_heads=key_heads,
        length=draw(lengths),
        width=draw(st.integers(1, 40)),
        value_width=draw(st.integers(1, 40)),
    )
    option = draw(st.sampled_from(list(recurrence_cases.OPTIONS.values())))
    torch.manual_seed(draw(seeds))
    problem = recurrence_cases.random_problem(sizes, **option(sizes), **options)
    # Ordinary keys, and those that climb and fall by what ends a chunk of the kernels.
    problem.key *= draw(st.sampled_from([1.0, 10.0, 40.0]))
    return problem


def assert_same_recurrence(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, tensor in expected.items():
        torch.testing.assert_close(
            actual[name], tensor, rtol=2e-5, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


@modest
@given(recurrences(), st.lists(st.integers(0, 140), max_size=4))
def test_a_recurrence_in_any_pieces_is_the_whole(problem: recurrence_cases.Problem, cuts: list[int]) -> None:
    length = problem.key.shape[2]
    edges = [0, *sorted(min(cut, length) for cut in cuts), length]
    assert_same_recurrence(
        recurrence_cases.in_pieces(problem, edges, "native"), recurrence_cases.outputs(problem, "native")
    )


@modest
@given(recurrences(causal=False))
def test_permuting_the_keys_of_a_recurrence_changes_nothing_without_causality(
    problem: recurrence_cases.Problem,
) -> None:
    order = torch.randperm(problem.key.shape[2])
    options = dict(problem.options)
    if "key_gain" in options:
        options["key_gain"] = options["key_gain"][:, :, order]
    if "key_mask" in options:
        options["key_mask"] = options["key_mask"][:, order]
    permuted = recurrence_cases.Problem(problem.query, problem.key[:, :, order], problem.value[:, :, order], options)
    assert_same_recurrence(recurrence_cases.outputs(permuted, "native"), recurrence_cases.outputs(problem, "native"))
