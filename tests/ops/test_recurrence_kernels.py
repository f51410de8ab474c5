"""The native kernels of the additive recurrence against the float64 reference, forward and backward."""

from __future__ import annotations

import itertools
import math
import statistics
from functools import partial

import pytest
import torch
from attention_cases import DTYPES, LAYOUTS
from recurrence_cases import (
    CAUSAL,
    EVERY_DTYPE,
    ON_EVERY_ISA,
    OPTIONS,
    PACKINGS,
    Problem,
    Sizes,
    assert_results_are_close,
    in_pieces,
    outputs,
    random_gradients,
    random_problem,
    random_state,
    run,
)
from tolerance import FROBENIUS_BOUND, Comparison, assert_close_to_reference

import sightline as sl

# Around the kernels' chunks of 64 and their sub-blocks of 16, and several of them.
LENGTHS = [1, 2, 15, 17, 63, ON_EVERY_ISA(64), 65, ON_EVERY_ISA(203), 513]
# (Dk, Dv) around the vectors of every instruction set, and the largest.
WIDTHS = [(1, 1), (3, 5), (8, 8), (17, 33), (64, 128), (130, 20), (512, 512)]


@CAUSAL
@pytest.mark.parametrize("length", LENGTHS)
@EVERY_DTYPE
def test_lengths(length, dtype, causal):
    sizes = Sizes(batch=max(2, 64 // length), length=length)
    assert_results_are_close(random_problem(sizes, dtype, causal=causal))


@CAUSAL
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@EVERY_DTYPE
def test_widths(widths, dtype, causal):
    heads = {"heads": 2, "key_heads": 1} if max(widths) > 500 else {}  # the reference goes step by step
    # The fewer numbers there are, the more the largest of torch's errors in them is a matter of chance.
    sizes = Sizes(batch=max(1, 64 // max(widths)), length=70, width=widths[0], value_width=widths[1], **heads)
    assert_results_are_close(random_problem(sizes, dtype, causal=causal))


@CAUSAL
@pytest.mark.parametrize("key_heads", [1, 2, 6])
def test_grouped_keys(key_heads, causal):
    assert_results_are_close(random_problem(Sizes(heads=6, key_heads=key_heads, length=100), causal=causal))


@CAUSAL
@pytest.mark.parametrize("option", [*OPTIONS, *PACKINGS])
@EVERY_DTYPE
def test_options(option, dtype, causal):
    packed = option in PACKINGS
    sizes = Sizes(batch=1 if packed else 2)
    options = (PACKINGS if packed else OPTIONS)[option](sizes)
    results = assert_results_are_close(random_problem(sizes, dtype, causal=causal, **options))
    assert ("key_gain" in results) == ("key_gain" in options)


@pytest.mark.isa
@CAUSAL
@pytest.mark.parametrize("option", [*OPTIONS, *PACKINGS])
def test_options_where_outputs_are_written_in_place(option, causal):
    """In float32 products go into the tensor where its rows are whole vectors."""
    packed = option in PACKINGS
    sizes = Sizes(batch=1 if packed else 2, value_width=32)
    options = (PACKINGS if packed else OPTIONS)[option](sizes)
    problem = random_problem(sizes, causal=causal, **options)
    problem.query[0, 1, 70, 3] = math.inf
    infinite = outputs(problem, "native")["output"]
    assert not infinite[0, 1, 70].isfinite().any() or (infinite[0, 1, 70] == 0).all()
    problem.query[0, 1, 70, 3] = 0.5
    finite = assert_results_are_close(problem)["output"]
    infinite[0, 1, 70] = finite[0, 1, 70]
    assert torch.equal(infinite, finite)


@pytest.mark.isa
@CAUSAL
@EVERY_DTYPE
@pytest.mark.parametrize("option", ["plain", "gain"])
def test_the_only_key_of_a_padded_entry_has_no_gradient(option, dtype, causal):
    """What its value gives to it, <G, S> takes away: both must come from the same G and the same weight."""
    sizes = Sizes(batch=12)
    mask = torch.arange(150) >= torch.tensor([[149], [0]]).repeat(6, 1)
    assert_results_are_close(random_problem(sizes, dtype, causal=causal, key_mask=mask, **OPTIONS[option](sizes)))


@pytest.mark.isa
@CAUSAL
def test_everything_at_once(causal):
    sizes = Sizes(length=300)
    assert_results_are_close(random_problem(sizes, causal=causal, **OPTIONS["everything"](sizes)))


def test_gradient_of_the_initial_state_is_as_exact_as_that_of_torch():
    """Its first rows weigh most: with small terms added to their sum one by one it has 1.1 to 1.7 times the error."""
    sizes = Sizes(batch=2, heads=2, key_heads=1, length=70, width=8, value_width=12)
    ratios = []
    for _ in range(15):
        problem = random_problem(sizes, initial_state=random_state(sizes, sizes.batch))
        gradients = random_gradients(problem)
        exact, native, torch_made = (
            run(given, backend, gradients)["initial log_normalizer"]
            for given, backend in ((problem.in_float64(), "reference"), (problem, "native"), (problem, "reference"))
        )
        ratios.append(float((native - exact).norm() / (torch_made - exact).norm()))
    assert statistics.median(ratios) < 1.1


@pytest.mark.parametrize("wanted", ["output", "log_normalizer", "memory"])
@CAUSAL
def test_one_output_alone_has_gradients(wanted, causal):
    sizes = Sizes(length=70)
    problem = random_problem(sizes, causal=causal, **OPTIONS["everything"](sizes))
    gradients = {name: torch.zeros_like(gradient) for name, gradient in random_gradients(problem).items()}
    gradients[wanted].normal_()
    alone = run(problem, "native", {wanted: gradients[wanted]})
    for name, tensor in run(problem, "native", gradients).items():
        torch.testing.assert_close(alone[name], tensor)
    assert_results_are_close(problem, gradients)


@pytest.mark.parametrize("step", [100.0, ON_EVERY_ISA(25.0), 7.0, -7.0, ON_EVERY_ISA(-100.0)])
@CAUSAL
@EVERY_DTYPE
def test_steep_keys_lose_no_accuracy(dtype, step, causal):
    """Keys that climb or fall by `step` every eight rows, in about half of the channels."""
    sizes = Sizes(length=150, width=20)
    climbing = torch.rand(20) < 0.5
    problem = random_problem(sizes, dtype, causal=causal, ramp=climbing * step / 8 * torch.arange(150.0)[:, None])
    # The first rows hold all the weight of every row after them, and unordered the last ones that of every row.
    dominated = step < -20 or (step > 20 and not causal)
    assert_results_are_close(problem, one_key_dominates=dominated)


@pytest.mark.parametrize("weight", [-60.0, 60.0])
@CAUSAL
def test_a_state_far_heavier_or_lighter_than_the_keys(weight, causal):
    """Outputs alone: what the log normaliser of such a state receives is the difference of almost equal numbers."""
    sizes = Sizes(length=70)
    problem = random_problem(sizes, causal=causal, **OPTIONS["state"](sizes))
    problem.options["initial_state"].log_normalizer.add_(weight)

    def compare(name, problem):
        exact, in_dtype = outputs(problem.in_float64(), "reference"), outputs(problem, "reference")
        return Comparison(outputs(problem, "native")[name], exact[name], in_dtype[name])

    for name in ("output", "log_normalizer", "memory"):
        redraw = partial(lambda name, turn: compare(name, problem.redrawn(turn)), name)
        assert_close_to_reference(compare(name, problem), name=name, redraw=redraw)


@pytest.mark.isa
@CAUSAL
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # float16 ends at 65504
def test_values_as_large_as_they_may_be(dtype, causal):
    """Under the keys that make the largest state: the first sets the unit, and all others have e^19.9 of it."""
    problem = random_problem(Sizes(batch=1, length=200), dtype, causal=causal)
    problem.key.fill_(19.9)[:, :, 0] = 0.0
    problem.value.uniform_(0.5, 1.0).mul_(6.5e29 / 200)
    exact, results = outputs(problem.in_float64(), "reference"), outputs(problem, "native")
    for name in ("output", "memory"):
        error = (results[name].double() - exact[name]).norm() / exact[name].norm()
        assert error < FROBENIUS_BOUND[dtype], name


def test_steps_of_a_hundred_from_row_to_row():
    problem = random_problem(Sizes(length=40))
    problem.key *= 100
    assert_results_are_close(problem)


@pytest.mark.parametrize("option", ["plain", "key_mask", "left_padding", ON_EVERY_ISA("everything")])
@pytest.mark.parametrize("step", [0.0, 25.0, -25.0, 100.0])
@EVERY_DTYPE
def test_a_sequence_in_pieces_gives_the_outputs_and_the_state_of_the_whole(dtype, step, option):
    """Pieces around the chunks of 64 rows, some of one row, with keys that climb or fall by `step` every eight rows."""
    sizes = Sizes(length=150)
    ramp = (torch.rand(24) < 0.5) * step / 8 * torch.arange(150.0)[:, None]
    problem = random_problem(sizes, dtype, ramp=ramp, **OPTIONS[option](sizes))
    cuts = [0, 1, 64, 65, 66, 130, 150]

    def compare(name, problem):
        exact, in_dtype = outputs(problem.in_float64(), "reference"), outputs(problem, "reference")
        return Comparison(in_pieces(problem, cuts, "native")[name], exact[name], in_dtype[name])

    for name in ("output", "log_normalizer", "memory"):
        redraw = partial(lambda name, turn: compare(name, problem.redrawn(turn)), name)
        assert_close_to_reference(compare(name, problem), name=name, dtype=dtype, redraw=redraw)


@CAUSAL
def test_documents_of_one_and_two_rows_give_what_they_give_alone(causal):
    cuts = [0, 1, 3, 4, 70, 72, 73]
    sizes = Sizes(batch=1, length=73)
    packed = random_problem(sizes, causal=causal, cu_seqlens=torch.tensor(cuts, dtype=torch.int32))
    gradients = {"output": random_gradients(packed)["output"]}
    results = run(packed, "native", gradients)
    for first, end in itertools.pairwise(cuts):
        rows = slice(first, end)
        alone = Problem(packed.query[:, :, rows], packed.key[:, :, rows], packed.value[:, :, rows], {"causal": causal})
        expected = run(alone, "native", {"output": gradients["output"][:, :, rows]})
        for name in ("output", "query", "key", "value"):
            torch.testing.assert_close(results[name][:, :, rows], expected[name])


@pytest.mark.parametrize("backend", ["native", "reference"])
@CAUSAL
def test_rows_outside_of_all_documents_are_zero(backend, causal):
    sizes, cuts = Sizes(batch=1), torch.tensor([2], dtype=torch.int32)
    problem = random_problem(sizes, cu_seqlens=cuts, causal=causal, key_gain=torch.randn(sizes.key_shape()))
    results = run(problem, backend, {"output": torch.ones(1, 4, 150, 37)})
    assert not results["output"].any()
    assert results["log_normalizer"].shape == (0, 2, 24)
    assert results["memory"].shape == (0, 2, 24, 37)
    for name in ("query", "key", "value", "key_gain"):
        assert not results[name].any(), name


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_offsets_that_fall_or_leave_the_tensor_are_cut_off(backend):
    problem = random_problem(Sizes(batch=1), cu_seqlens=torch.tensor([-5, 100, 60, 1000], dtype=torch.int32))
    results = outputs(problem, backend)
    problem.options["cu_seqlens"] = torch.tensor([0, 100, 100, 150], dtype=torch.int32)
    for name, tensor in outputs(problem, backend).items():
        assert torch.equal(tensor, results[name]), name


@pytest.mark.isa
@pytest.mark.parametrize("value_width", [70, 200, 512])
@CAUSAL
def test_the_only_key_of_a_sequence_has_no_gradient(value_width, causal):
    problem = random_problem(Sizes(heads=2, length=1, value_width=value_width), causal=causal)
    gradients = {"output": random_gradients(problem)["output"]}
    assert not run(problem, "native", gradients)["key"].any()


@pytest.mark.parametrize("layout", LAYOUTS)
@CAUSAL
def test_memory_layouts(layout, causal):
    sizes = Sizes(length=70)
    problem = random_problem(sizes, causal=causal, **OPTIONS["everything"](sizes))
    arrange = LAYOUTS[layout]
    moved = problem.arranged(arrange)
    gradients = random_gradients(problem)
    expected = run(problem, "native", gradients)
    gradients["output"] = arrange(gradients["output"])
    for name, tensor in run(moved, "native", gradients).items():
        assert torch.equal(tensor, expected[name]), name


@CAUSAL
def test_a_state_in_any_layout(causal):
    sizes = Sizes(length=20)
    state = OPTIONS["state"](sizes)["initial_state"]
    strided = sl.RecurrenceState(state.log_normalizer.mT.contiguous().mT, state.memory.mT.contiguous().mT)
    problem = random_problem(sizes, causal=causal)
    for name, tensor in outputs(
        Problem(problem.query, problem.key, problem.value, {"initial_state": strided, "causal": causal}), "native"
    ).items():
        problem.options["initial_state"] = state
        assert torch.equal(tensor, outputs(problem, "native")[name]), name


def test_a_single_key_has_no_gradient():
    """Its weight is 1 whatever it is."""
    for dtype in DTYPES.values():
        problem = random_problem(Sizes(length=1), dtype)
        gradient = run(problem, "native", {"output": torch.randn(2, 4, 1, 37)})["key"]
        assert gradient.abs().max() <= 1e-5


def test_value_one_gives_the_sum_of_the_query():
    problem = random_problem(Sizes(length=300))
    problem.value.fill_(1)
    expected = problem.query.sum(-1, keepdim=True).expand(-1, -1, -1, 37)
    torch.testing.assert_close(outputs(problem, "native")["output"], expected, rtol=1e-5, atol=1e-5)
