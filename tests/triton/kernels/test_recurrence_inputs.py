"""What the Triton recurrence takes: any memory layout and offsets; documents, batch entries and heads keep apart."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from attention_cases import DTYPES, LAYOUTS
from recurrence_cases import (
    CAUSAL,
    OPTIONS,
    PACKINGS,
    Problem,
    Sizes,
    assert_results_are_close,
    random_gradients,
    random_problem,
    random_state,
    run,
)

import sightline as sl

pytestmark = pytest.mark.usefixtures("arithmetic_of_a_gpu")

# More rows than a chunk of the backward has (32), and for documents than one of 16-bit inputs has (64).
SMALL = Sizes(batch=2, heads=4, key_heads=2, length=40, width=16, value_width=20)
PACKED = Sizes(batch=1, heads=4, key_heads=2, length=70, width=16, value_width=20)
MASK_LAYOUTS = {
    "transposed": lambda mask: mask.T.contiguous().T,
    "every_second_column": lambda mask: torch.stack([mask, ~mask], 2)[:, :, 0],
    "slice_of_wider_rows": lambda mask: torch.cat([~mask, mask, ~mask], 1)[:, mask.shape[1] : 2 * mask.shape[1]],
}


def assert_all_equal(actual, expected):
    assert actual.keys() == expected.keys()
    for name, tensor in actual.items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("layout", LAYOUTS)
@CAUSAL
def test_memory_layouts(layout, causal):
    """Of everything with four axes, and of the gradients of the state: the numbers read are the same ones."""
    problem = random_problem(SMALL, causal=causal, **OPTIONS["everything"](SMALL))
    arrange = LAYOUTS[layout]
    moved = problem.arranged(arrange)
    gradients = random_gradients(problem)
    expected = run(problem, "triton", gradients)
    gradients["output"], gradients["memory"] = arrange(gradients["output"]), arrange(gradients["memory"])
    gradients["log_normalizer"] = gradients["log_normalizer"].mT.contiguous().mT
    assert_all_equal(run(moved, "triton", gradients), expected)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_a_non_contiguous_last_axis_in_every_dtype(dtype):
    problem = random_problem(SMALL, dtype)
    transposed = [tensor.mT.contiguous().mT.requires_grad_() for tensor in (problem.query, problem.key, problem.value)]
    assert all(tensor.stride(3) != 1 for tensor in transposed)
    gradients = random_gradients(problem)
    assert_all_equal(run(Problem(*transposed), "triton", gradients), run(problem, "triton", gradients))


@CAUSAL
def test_inputs_expanded_over_batch_and_heads(causal):
    """Axes of stride 0, as a gradient of `output.sum()` has them too."""
    problem = random_problem(SMALL, causal=causal, key_gain=torch.randn(SMALL.key_shape()))

    def expand(tensor):
        return tensor[:1, :1].expand(tensor.shape)

    gain = problem.options["key_gain"]
    given = (problem.query, problem.key, problem.value)
    expanded = Problem(*map(expand, given), problem.options | {"key_gain": expand(gain)})
    copied = Problem(
        *(expand(tensor).contiguous() for tensor in given),
        problem.options | {"key_gain": expand(gain).contiguous()},
    )
    one = torch.ones(())
    shape = (SMALL.batch, SMALL.heads, SMALL.length, SMALL.value_width)
    expected = run(copied, "triton", {"output": torch.ones(shape)})
    assert_all_equal(run(expanded, "triton", {"output": one.expand(shape)}), expected)


@pytest.mark.parametrize("layout", MASK_LAYOUTS)
@CAUSAL
def test_a_key_mask_in_any_layout(layout, causal):
    mask = torch.rand(SMALL.batch, SMALL.length) < 0.6
    strided = MASK_LAYOUTS[layout](mask)
    assert not strided.is_contiguous()
    assert torch.equal(strided, mask)
    problem = random_problem(SMALL, causal=causal, key_mask=mask)
    gradients = random_gradients(problem)
    expected = run(problem, "triton", gradients)
    problem.options["key_mask"] = strided
    assert_all_equal(run(problem, "triton", gradients), expected)


def test_a_key_mask_expanded_over_the_batch():
    mask = (torch.rand(1, SMALL.length) < 0.6).expand(SMALL.batch, -1)
    assert mask.stride(0) == 0
    problem = random_problem(SMALL, key_mask=mask)
    gradients = random_gradients(problem)
    results = run(problem, "triton", gradients)
    problem.options["key_mask"] = mask.contiguous()
    assert_all_equal(results, run(problem, "triton", gradients))


@CAUSAL
def test_a_state_and_offsets_in_any_layout(causal):
    cuts, state = torch.tensor([1, 23, 23, 69], dtype=torch.int32), random_state(PACKED, 3)
    problem = random_problem(PACKED, causal=causal, cu_seqlens=cuts, initial_state=state)
    gradients = random_gradients(problem)
    expected = run(problem, "triton", gradients)
    problem.options["initial_state"] = sl.RecurrenceState(
        state.log_normalizer.mT.contiguous().mT, state.memory.mT.contiguous().mT
    )
    problem.options["cu_seqlens"] = torch.stack([cuts, cuts + 7], 1)[:, 0]
    assert not problem.options["cu_seqlens"].is_contiguous()
    assert_all_equal(run(problem, "triton", gradients), expected)


# Offsets of three documents of PACKED, and what they are cut off to.
OUT_OF_ORDER = {
    "falling": ([0, 40, 25, 70], [0, 40, 40, 70]),
    "beyond_both_ends": ([-5, 20, 45, 1000], [0, 20, 45, 70]),
    "far_beyond_both_ends": ([-(2**31), -3, 2**31 - 1, 90], [0, 0, 70, 70]),
    "falling_to_the_start": ([30, 0, 62, 10], [30, 30, 62, 62]),
}


@pytest.mark.parametrize("offsets", OUT_OF_ORDER)
@CAUSAL
def test_offsets_that_fall_or_leave_the_tensor_are_cut_off(offsets, causal):
    given, meant = (torch.tensor(cuts, dtype=torch.int32) for cuts in OUT_OF_ORDER[offsets])
    options = {"key_gain": torch.randn(PACKED.key_shape()), "initial_state": random_state(PACKED, 3)}
    problem = random_problem(PACKED, causal=causal, cu_seqlens=given, **options)
    gradients = random_gradients(problem)
    results = run(problem, "triton", gradients)
    problem.options["cu_seqlens"] = meant
    assert_all_equal(results, run(problem, "triton", gradients))


@CAUSAL
def test_offsets_that_fall_and_leave_the_tensor_mean_what_they_mean_to_the_reference(causal):
    cuts = torch.tensor([-5, 40, 25, 1000], dtype=torch.int32)
    problem = random_problem(PACKED, causal=causal, cu_seqlens=cuts, initial_state=random_state(PACKED, 3))
    assert_results_are_close(problem, backend="triton")


@CAUSAL
def test_documents_give_what_they_give_alone(causal):
    """Some of one or two rows, with and without rows of a chunk's other half: no chunk has rows of two of them."""
    cuts = [2, 3, 5, 5, 38, 40, 70]
    packed = random_problem(PACKED, causal=causal, cu_seqlens=torch.tensor(cuts, dtype=torch.int32))
    gradients = {"output": random_gradients(packed)["output"]}
    results = run(packed, "triton", gradients)
    for name in ("output", "query", "key", "value"):
        assert not results[name][:, :, :2].any(), name
    for document, (first, end) in enumerate(itertools.pairwise(cuts)):
        rows = slice(first, end)
        alone = Problem(packed.query[:, :, rows], packed.key[:, :, rows], packed.value[:, :, rows], {"causal": causal})
        expected = run(alone, "triton", {"output": gradients["output"][:, :, rows]})
        for name in ("output", "query", "key", "value"):
            torch.testing.assert_close(results[name][:, :, rows], expected[name])
        for name in ("log_normalizer", "memory"):
            torch.testing.assert_close(results[name][document], expected[name][0])


@CAUSAL
@pytest.mark.parametrize("with_state", [False, True], ids=["plain", "state"])
def test_without_documents_all_rows_are_zero(with_state, causal):
    options = {"cu_seqlens": torch.tensor([2], dtype=torch.int32), "key_gain": torch.randn(PACKED.key_shape())}
    if with_state:
        options["initial_state"] = random_state(PACKED, 0)
    problem = random_problem(PACKED, causal=causal, **options)
    results = run(problem, "triton", {"output": torch.ones(1, 4, 70, 20)})
    assert results["output"].shape == (1, 4, 70, 20)
    assert results["log_normalizer"].shape == (0, 2, 16)
    assert results["memory"].shape == (0, 2, 16, 20)
    for name in ("output", "query", "key", "value", "key_gain"):
        assert not results[name].any(), name
    if with_state:
        assert results["initial memory"].shape == (0, 2, 16, 20)


@CAUSAL
@pytest.mark.parametrize("length", [0, 40])
def test_empty_documents_hand_their_states_on(length, causal):
    sizes = Sizes(batch=1, heads=2, key_heads=1, length=length, width=16, value_width=20)
    state, middle = random_state(sizes, 3), length // 2
    problem = random_problem(
        sizes,
        causal=causal,
        cu_seqlens=torch.full((4,), middle, dtype=torch.int32),
        initial_state=state,
    )
    gradients = random_gradients(problem)
    results = run(problem, "triton", gradients)
    assert not results["output"].any()
    assert torch.equal(results["log_normalizer"], state.log_normalizer)
    assert torch.equal(results["memory"], state.memory)
    for name, expected in run(problem, "reference", gradients).items():
        torch.testing.assert_close(results[name], expected)


# "gradient" is that of the output. Keys and values have one head per two of the others.
NOT_FINITE = pytest.mark.parametrize(
    ("number", "where"),
    [(math.nan, "query"), (math.nan, "key"), (math.inf, "key"), (math.inf, "value"), (math.nan, "gradient")],
)


@CAUSAL
@pytest.mark.parametrize(
    ("packing", "dtype"),
    [("documents", "fp32"), ("documents_with_states", "fp32"), ("two_documents", "bf16")],
)
@NOT_FINITE
def test_a_non_finite_number_stays_in_its_document_and_head(number, where, packing, dtype, causal):
    problem = random_problem(PACKED, DTYPES[dtype], causal=causal, **PACKINGS[packing](PACKED))
    document, begin, end, row = problem.row_in_a_document()
    clean, spoilt = clean_and_spoilt(problem, where, number, (0, row))
    reached = [3] if where in ("query", "gradient") else [2, 3]
    assert_reaches_its_own_rows(spoilt, where, (0, row), reached, (begin, end), causal)
    for name, tensor in spoilt.items():
        of_states = "log_normalizer" in name or "memory" in name
        rows = document if of_states else slice(begin, end)
        assert_equal_outside(tensor, clean[name], (rows,) if of_states else (0, rows), name)


@CAUSAL
@NOT_FINITE
def test_a_non_finite_number_stays_in_its_batch_entry_and_head(number, where, causal):
    problem = random_problem(SMALL, causal=causal, **OPTIONS["state"](SMALL))
    clean, spoilt = clean_and_spoilt(problem, where, number, (1, 20))
    reached = [3] if where in ("query", "gradient") else [2, 3]
    assert_reaches_its_own_rows(spoilt, where, (1, 20), reached, (0, SMALL.length), causal)
    for name, tensor in spoilt.items():
        of_states = "log_normalizer" in name or "memory" in name
        assert_equal_outside(tensor, clean[name], (1,) if of_states else (1, slice(None)), name)


def clean_and_spoilt(problem, where, number, place):
    """run() before and after a number of the last head of what `where` names, at (batch entry, row), is replaced."""
    gradients = random_gradients(problem)
    clean = run(problem, "triton", gradients)
    holder = gradients["output"] if where == "gradient" else getattr(problem, where)
    holder[place[0], -1, place[1], 3] = number
    return clean, run(problem, "triton", gradients)


def assert_reaches_its_own_rows(spoilt, where, place, heads, bounds, causal):
    """So that what stays clean elsewhere says something: outputs, or gradients of values, that see the number."""
    batch, row = place
    first, end = bounds
    if where == "gradient":
        # A row's gradient reaches the values that it reads.
        seen = spoilt["value"][batch, -1, first : row + 1 if causal else end]
    else:
        later = slice(row, row + 1) if where == "query" else slice(row if causal else first, end)
        seen = spoilt["output"][batch, heads, later]
    assert seen.numel()
    assert (~seen.isfinite()).any(-1).sum() >= 0.5 * seen.shape[:-1].numel()


def assert_equal_outside(actual, expected, own, name):
    """own: the batch entry and rows, or the state, that the number may reach in the last key head and its queries."""
    heads = slice(actual.shape[1] // 2, None)
    others = torch.ones(actual.shape, dtype=torch.bool)
    others[(own[0], heads, *own[1:])] = False
    assert not others.all()
    assert torch.equal(actual[others], expected[others]), name
