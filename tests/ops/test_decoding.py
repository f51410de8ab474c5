"""Few query rows per key head without gradients: csrc/cpu/attention_decode.cpp, whose chunks hold 2,048 keys."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from attention_cases import (
    DTYPES,
    LAYOUTS,
    MAIN_WEIGHTINGS,
    OPTION_PAIRS,
    OPTIONS,
    PAIRS,
    SOFTMAX_OPTIONS,
    WEIGHTINGS,
    Problem,
    Sizes,
    by_turn,
    random_problem,
    run,
)
from attention_checks import assert_outputs_are_close

import sightline as sl

every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
every_pair = pytest.mark.parametrize(("weighting", "dtype"), PAIRS.values(), ids=PAIRS.keys())
option_pairs = pytest.mark.parametrize(("weighting", "dtype"), OPTION_PAIRS.values(), ids=OPTION_PAIRS.keys())
main_weightings = pytest.mark.parametrize("weighting", MAIN_WEIGHTINGS.values(), ids=MAIN_WEIGHTINGS.keys())

DECODING = Sizes(batch=3, heads=4, key_heads=2, queries=1, keys=2100, width=64, value_width=64)
# A mask of scores and dropout go to the kernel of many rows.
DECODED = [name for name, make in OPTIONS.items() if not {"attn_mask", "dropout_p"} & set(make(DECODING))]


def decode(problem: Problem, weighting: Any) -> dict[str, torch.Tensor]:
    return assert_outputs_are_close(problem, weighting, lambda problem: run(problem, weighting, "native"))


@every_pair
@pytest.mark.parametrize("keys", [1, pytest.param(100, marks=pytest.mark.isa), 2100])
def test_every_weighting(keys: int, weighting: Any, dtype: torch.dtype) -> None:
    decode(random_problem(replace(DECODING, keys=keys), dtype, causal=True), weighting)


@by_turn("keys", [2, 15, 2048, 2049, 4500])
def test_any_number_of_keys(keys: int, weighting: Any, dtype: torch.dtype) -> None:
    decode(random_problem(replace(DECODING, keys=keys), dtype, causal=True), weighting)


@by_turn(("keys", "left"), [pytest.param(2100, 100, marks=pytest.mark.isa), (4100, 2070), (4097, 60), (6200, 4137)])
def test_first_visible_key_within_a_chunk(keys: int, left: int, weighting: Any, dtype: torch.dtype) -> None:
    """The keys of the first chunk end with it, at no multiple of a vector, and those of the next are visible too."""
    decode(random_problem(replace(DECODING, keys=keys), dtype, causal=True, window=(left, None)), weighting)


@main_weightings
def test_first_document_with_a_row_begins_within_a_chunk(weighting: Any) -> None:
    cuts = {
        "cu_seqlens_q": torch.tensor([0, 0, 1], dtype=torch.int32),
        "cu_seqlens_k": torch.tensor([0, 1999, 2100], dtype=torch.int32),
    }
    decode(random_problem(replace(DECODING, batch=1), torch.float32, causal=True, **cuts), weighting)


def test_equal_keys_share_the_weight_across_chunks() -> None:
    query, key, value = torch.zeros(1, 1, 1, 64), torch.zeros(1, 1, 2100, 64), torch.ones(1, 1, 2100, 64)
    options = {"causal": True, "window": (100, None), "observe": sl.Observe(log_normalizer=True)}
    output, stats = sl.attention(query, key, value, **options)
    torch.testing.assert_close(output, torch.ones(1, 1, 1, 64))
    torch.testing.assert_close(stats.log_normalizer, torch.full((1, 1, 1), math.log(101)))


@by_turn("rows", [(1, 1), (1, 2), (3, 1), (1, 5), pytest.param((2, 3), marks=pytest.mark.isa), (7, 1)])
def test_every_number_of_rows(rows: tuple[int, int], weighting: Any, dtype: torch.dtype) -> None:
    group, queries = rows
    sizes = replace(DECODING, batch=3, heads=2 * group, queries=queries, keys=300)
    decode(random_problem(sizes, dtype, causal=True), weighting)


@pytest.mark.isa
@by_turn("widths", [(32, 32), (96, 160), (512, 64)])
def test_every_width(widths: tuple[int, int], weighting: Any, dtype: torch.dtype) -> None:
    width, value_width = widths
    sizes = replace(DECODING, batch=2, keys=150, width=width, value_width=value_width)
    decode(random_problem(sizes, dtype), weighting)


@option_pairs
@pytest.mark.parametrize("option", DECODED)
def test_every_option(option: str, weighting: Any, dtype: torch.dtype) -> None:
    sizes = replace(DECODING, queries=2)
    decode(random_problem(sizes, dtype, **OPTIONS[option](sizes)), weighting)


@pytest.mark.parametrize("weighting", ["softmax", "ssmax", "capped", "cosine"])
@pytest.mark.parametrize("option", SOFTMAX_OPTIONS)
def test_sinks(option: str, weighting: str) -> None:
    options = SOFTMAX_OPTIONS[option](DECODING)
    decode(random_problem(DECODING, torch.float32, **options), WEIGHTINGS[weighting])


@pytest.mark.parametrize("sink", [-math.inf, -200.0, 200.0])
def test_sinks_far_from_every_score(sink: float) -> None:
    problem = random_problem(DECODING, torch.float32, sinks=torch.full((4,), sink))
    expected, actual = run(problem, WEIGHTINGS["softmax"], "reference"), run(problem, WEIGHTINGS["softmax"], "native")
    torch.testing.assert_close(actual["output"], expected["output"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(actual["log_normalizer"], expected["log_normalizer"])


@pytest.mark.parametrize("jump", [200.0, -200.0])
def test_softmax_whose_chunks_differ_by_more_than_exp_can_hold(jump: float) -> None:
    problem = random_problem(DECODING, torch.float32, scale=1.0)
    problem.query[..., 0] = 1.0
    problem.key[:, :, 2048:, 0] += jump
    decode(problem, WEIGHTINGS["softmax"])


@by_turn("layout", LAYOUTS)
def test_inputs_in_any_memory_give_the_same_bits(layout: str, weighting: Any, dtype: torch.dtype) -> None:
    problem = random_problem(replace(DECODING, keys=130), dtype, causal=True)
    inputs = (LAYOUTS[layout](tensor) for tensor in (problem.query, problem.key, problem.value))
    expected, actual = run(problem, weighting, "native"), run(Problem(*inputs, problem.options), weighting, "native")
    assert torch.equal(actual["output"], expected["output"])
    assert torch.equal(actual["log_normalizer"], expected["log_normalizer"])


@every_dtype
@main_weightings
def test_the_number_of_threads_changes_no_bit(weighting: Any, dtype: torch.dtype) -> None:
    problem = random_problem(replace(DECODING, batch=1, keys=9000), dtype)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = run(problem, weighting, "native")["output"]
        torch.set_num_threads(2)
        together = run(problem, weighting, "native")["output"]
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(alone, together)


@pytest.mark.isa
@main_weightings
@pytest.mark.parametrize("place", [5, 2099])
@pytest.mark.parametrize("poisoned", ["key", "value"])
def test_what_no_row_sees_may_be_anything(poisoned: str, place: int, weighting: Any) -> None:
    seen = torch.ones(3, 2100, dtype=torch.bool)
    seen[2, place] = False
    problem = random_problem(DECODING, torch.float32, key_mask=seen)
    clean = run(problem, weighting, "native")["output"]
    getattr(problem, poisoned)[2, :, place] = math.nan
    output = run(problem, weighting, "native")["output"]
    # The values are added up in another order where one of them is NaN.
    torch.testing.assert_close(output, clean)


@pytest.mark.isa
@main_weightings
@pytest.mark.parametrize("poisoned", ["key", "value"])
def test_what_a_row_sees_reaches_it_alone(poisoned: str, weighting: Any) -> None:
    problem = random_problem(replace(DECODING, queries=2), torch.float32, causal=True)
    # The last key, in the second chunk, of one key head: seen by the second row of its two query heads. Re-weighting
    # keeps a value from rows that give it no weight: this key is the one that all look at.
    problem.key[1, 1, -1] = 3.0 * problem.query[1, 2:, 1].mean(0)
    problem.query[1, 3] = problem.query[1, 2]
    clean = run(problem, weighting, "native")["output"]
    getattr(problem, poisoned)[1, 1, -1] = math.nan
    output = run(problem, weighting, "native")["output"]
    reached = torch.zeros(3, 4, 2, dtype=torch.bool)
    reached[1, 2:, 1] = True
    assert output[reached].isnan().all()
    torch.testing.assert_close(output[~reached], clean[~reached])


def test_the_operator_keeps_its_promises() -> None:
    query, key, value = torch.randn(2, 8, 2, 32), torch.randn(2, 2, 40, 32), torch.randn(2, 2, 40, 64)
    lengths, mask = torch.tensor([7, 40]), torch.rand(2, 40) < 0.7
    per_head = (torch.rand(8), torch.rand(8), torch.rand(8))
    arguments = (query, key, value, lengths, mask, *per_head, True, 30, -1, 1.0, 0, True, False, 5.0, 0.0, 1.0, 3)
    operator = torch.ops.sightline.attention_decode.default
    torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


@main_weightings
def test_the_shortcut_and_the_operator_of_many_arguments_agree(weighting: Any) -> None:
    problem = random_problem(DECODING, torch.float32, causal=True)
    shortcut = run(problem, weighting, "native")["output"]
    with torch.profiler.profile() as profile:  # whoever watches sees the operator itself
        watched = run(problem, weighting, "native")["output"]
    assert any(event.key == "sightline::attention" for event in profile.key_averages())
    assert torch.equal(shortcut, watched)
