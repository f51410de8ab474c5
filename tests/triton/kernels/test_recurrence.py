"""The Triton kernels of the additive recurrence against the float64 reference, and as operators."""

from __future__ import annotations

import math
import re
from functools import partial

import pytest
import torch
from attention_cases import DTYPES
from recurrence_cases import (
    CAUSAL,
    EVERY_DTYPE,
    OPTIONS,
    PACKINGS,
    Sizes,
    assert_a_state_that_is_not_finite_stays_so,
    assert_light_keys_add_up,
    assert_non_finite_keys_are_what_they_are_in_the_formula,
    assert_results_are_close,
    in_pieces,
    outputs,
    random_gradients,
    random_problem,
    random_state,
    run,
)
from recurrence_raw_calls import REFUSED, REFUSED_BACKWARD, arguments
from tolerance import Comparison, assert_close_to_reference

import sightline as sl
from sightline.ops.triton_recurrence import ADDITIVE_RECURRENCE_TRITON, ADDITIVE_RECURRENCE_TRITON_BACKWARD

pytestmark = pytest.mark.usefixtures("arithmetic_of_a_gpu")

SMALL = Sizes(batch=2, heads=2, key_heads=1, length=70, width=20, value_width=36)


@CAUSAL
@pytest.mark.parametrize(
    ("length", "dtype"),
    [(1, "fp32"), (31, "fp32"), (32, "bf16"), (70, "fp32"), (70, "fp16"), (70, "bf16")],
)
def test_lengths(length, dtype, causal):
    dtype = DTYPES[dtype]
    sizes = Sizes(batch=2 if length > 1 else 8, heads=2, key_heads=1, length=length, width=20, value_width=36)
    assert_results_are_close(random_problem(sizes, dtype, causal=causal), backend="triton")


@CAUSAL
@pytest.mark.parametrize("widths", [(1, 1), (16, 70), (70, 16)], ids=str)
def test_widths(widths, causal):
    sizes = Sizes(batch=1, heads=2, key_heads=2, length=40, width=widths[0], value_width=widths[1])
    assert_results_are_close(random_problem(sizes, causal=causal), backend="triton")


@CAUSAL
@pytest.mark.parametrize(("widths", "dtype"), [((256, 256), "bf16"), ((512, 48), "fp32"), ((48, 512), "fp32")], ids=str)
def test_the_largest_widths(widths, dtype, causal):
    sizes = Sizes(batch=1, heads=1, key_heads=1, length=35, width=widths[0], value_width=widths[1])
    assert_results_are_close(random_problem(sizes, DTYPES[dtype], causal=causal), backend="triton")


@CAUSAL
def test_an_empty_sequence_hands_its_state_on(causal):
    sizes = Sizes(batch=2, heads=2, key_heads=1, length=0, width=8, value_width=12)
    nothing = random_problem(sizes, causal=causal)
    for name, expected in outputs(nothing, "reference").items():
        assert torch.equal(outputs(nothing, "triton")[name], expected), name
    problem = random_problem(sizes, causal=causal, **OPTIONS["state"](sizes))
    gradients = random_gradients(problem)
    results = run(problem, "triton", gradients)
    for name, expected in run(problem, "reference", gradients).items():
        torch.testing.assert_close(results[name], expected)


@CAUSAL
@pytest.mark.parametrize("option", [*OPTIONS, *PACKINGS])
def test_options(option, causal):
    packed = option in PACKINGS
    sizes = Sizes(batch=1 if packed else 2, heads=2, key_heads=1, length=70, width=8, value_width=12)
    options = (PACKINGS if packed else OPTIONS)[option](sizes)
    assert_results_are_close(random_problem(sizes, causal=causal, **options), backend="triton")


@pytest.mark.parametrize("step", [100.0, -100.0])
@EVERY_DTYPE
@CAUSAL
def test_steep_keys_lose_no_accuracy(step, dtype, causal):
    """Keys that climb or fall by `step` every eight rows, in about half of the channels.

    Entries, heads and channels enough that of those few rows with all the weight no number is the largest by far.
    """
    sizes = Sizes(batch=2, heads=4, key_heads=2, length=40, width=16, value_width=16)
    ramp = (torch.rand(16) < 0.5) * step / 8 * torch.arange(40.0)[:, None]
    problem = random_problem(sizes, dtype, causal=causal, key_gain=torch.randn(sizes.key_shape()), ramp=ramp)
    assert_results_are_close(problem, backend="triton", one_key_dominates=step < 0 or not causal)


def test_what_is_left_of_a_gradient_where_all_keys_climb():
    """The last key takes all the weight: what its value and its gain give to its gradient, <G, S> takes away again."""
    sizes = Sizes(batch=4, heads=2, key_heads=1, length=12, width=8, value_width=8)
    ramp = 100.0 / 8 * torch.arange(12.0)[:, None]
    problem = random_problem(sizes, torch.float16, key_gain=torch.randn(sizes.key_shape()), ramp=ramp)
    assert_results_are_close(problem, backend="triton")


@CAUSAL
def test_the_only_key_of_a_padded_entry_has_no_gradient(causal):
    sizes = Sizes(batch=2, heads=2, key_heads=1, length=40, width=8, value_width=12)
    mask = torch.arange(40) >= torch.tensor([[39], [0]])
    assert_results_are_close(random_problem(sizes, torch.float16, causal=causal, key_mask=mask), backend="triton")


def test_a_sequence_in_pieces_gives_the_outputs_and_the_state_of_the_whole():
    problem = random_problem(SMALL, **OPTIONS["everything"](SMALL))

    def compare(name, problem):
        exact, in_dtype = outputs(problem.in_float64(), "reference"), outputs(problem, "reference")
        return Comparison(in_pieces(problem, [0, 1, 32, 33, 34, 70], "triton")[name], exact[name], in_dtype[name])

    for name in ("output", "log_normalizer", "memory"):
        redraw = partial(lambda name, turn: compare(name, problem.redrawn(turn)), name)
        assert_close_to_reference(compare(name, problem), name=name, redraw=redraw)


@pytest.mark.parametrize("piece", [1, 7])
def test_light_keys_are_not_lost_beside_a_heavy_state(piece):
    assert_light_keys_add_up(piece, "triton")


@pytest.mark.parametrize("where", ["key", "value", "query"])
@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_a_non_finite_number_reaches_later_outputs_of_its_own_head_alone(number, where):
    problem = random_problem(Sizes(batch=1, heads=2, key_heads=2, length=40, width=8, value_width=8))
    clean = outputs(problem, "triton")
    getattr(problem, where)[0, 1, 20, 3] = number
    spoilt = outputs(problem, "triton")
    touched = torch.zeros(1, 2, 40, dtype=torch.bool)
    touched[0, 1, 20 : 21 if where == "query" else None] = True
    torch.testing.assert_close(spoilt["output"][~touched], clean["output"][~touched])
    assert not spoilt["output"][touched].isfinite().all(-1).any()


@CAUSAL
def test_a_state_with_an_infinite_value_is_infinite_in_float16(causal):
    """What is left of a weight's bits may be negative, and must not meet it."""
    problem = random_problem(
        Sizes(batch=1, heads=1, key_heads=1, length=20, width=8, value_width=8), torch.float16, causal=causal
    )
    problem.value[0, 0, 3, 2] = math.inf
    memory = outputs(problem, "triton")["memory"]
    assert (memory[..., 2] == math.inf).all()
    assert memory[..., [0, 1, *range(3, 8)]].isfinite().all()


@CAUSAL
@pytest.mark.parametrize("number", [-math.inf, math.nan, math.inf])
@pytest.mark.parametrize(("length", "option"), [(1, "plain"), (1, "state"), (20, "state")])
def test_non_finite_keys_forward_and_backward(length, option, number, causal):
    # So many entries that the largest error of the finite gradients of the state is not one of a handful.
    sizes = Sizes(batch=20 if length == 1 else 6, heads=2, key_heads=1, length=length, width=8, value_width=12)
    assert_non_finite_keys_are_what_they_are_in_the_formula(number, sizes, causal, option, "triton")


@pytest.mark.parametrize(("number", "masked"), [(math.nan, True), (math.inf, True), (math.nan, False)])
def test_a_state_that_is_not_finite_stays_so_over_tokens_that_add_nothing(number, masked):
    assert_a_state_that_is_not_finite_stays_so(number, masked, torch.float32, "triton")


@CAUSAL
def test_masked_keys_may_hold_anything(causal):
    mask = torch.rand(2, 70) < 0.6
    problem = random_problem(SMALL, causal=causal, key_mask=mask, key_gain=torch.randn(SMALL.key_shape()))
    gradients = {"output": torch.randn(2, 2, 70, 36)}
    expected = run(problem, "triton", gradients)
    off = ~mask[:, None, :, None]
    for tensor in (problem.key, problem.value, problem.options["key_gain"]):
        tensor.masked_fill_(off, math.nan)
    for name, tensor in run(problem, "triton", gradients).items():
        torch.testing.assert_close(tensor, expected[name])


def test_opcheck():
    problem = random_problem(SMALL)
    inputs = (problem.query, problem.key, problem.value, torch.randn(SMALL.key_shape()), torch.rand(2, 70) < 0.8)
    state = OPTIONS["state"](SMALL)["initial_state"]
    arguments = (*inputs, None, *state, True, 0.5)
    torch.library.opcheck(ADDITIVE_RECURRENCE_TRITON, (*arguments, True))
    torch.library.opcheck(ADDITIVE_RECURRENCE_TRITON, (*arguments, False))
    output, *final = ADDITIVE_RECURRENCE_TRITON(*arguments, True)
    backward = (torch.randn_like(output), *map(torch.randn_like, final), *arguments)
    torch.library.opcheck(ADDITIVE_RECURRENCE_TRITON_BACKWARD, (*backward, True, True))
    every = ADDITIVE_RECURRENCE_TRITON_BACKWARD(*backward, True, True)
    some = ADDITIVE_RECURRENCE_TRITON_BACKWARD(*backward, False, False)
    assert [gradient.numel() for gradient in some[3:]] == [0, 0, 0]
    assert all(torch.equal(one, other) for one, other in zip(some[:3], every[:3], strict=True))


def test_opcheck_of_packed_documents():
    sizes = Sizes(batch=1, heads=2, key_heads=1, length=9, width=8, value_width=6)
    problem, state = random_problem(sizes), random_state(sizes, 3)
    cuts = torch.tensor([1, 4, 4, 9], dtype=torch.int32)
    arguments = (problem.query, problem.key, problem.value, None, None, cuts, *state, True, 0.5)
    torch.library.opcheck(ADDITIVE_RECURRENCE_TRITON, (*arguments, True))
    gradients = map(torch.randn_like, ADDITIVE_RECURRENCE_TRITON(*arguments, True))
    torch.library.opcheck(ADDITIVE_RECURRENCE_TRITON_BACKWARD, (*gradients, *arguments, True, True))


def test_compiled_forward_and_backward_equal_eager():
    def loss(query, key, value):
        return sl.additive_recurrence(query, key, value, backend="triton").square().sum()

    problem = random_problem(SMALL)
    inputs = [tensor.requires_grad_() for tensor in (problem.query, problem.key, problem.value)]
    expected = torch.autograd.grad(loss(*inputs), inputs)
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for one, other in zip(torch.autograd.grad(compiled(*inputs), inputs), expected, strict=True):
        torch.testing.assert_close(one, other)


def test_output_is_a_view_of_memory_with_the_heads_inside():
    assert outputs(random_problem(SMALL), "triton")["output"].transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("name", REFUSED)
def test_a_raw_call_that_would_read_out_of_bounds_is_refused(name):
    changes, message = REFUSED[name]
    with pytest.raises(RuntimeError, match=re.escape(message)):
        ADDITIVE_RECURRENCE_TRITON(*on_default_device(arguments(ADDITIVE_RECURRENCE_TRITON, **changes)))


@pytest.mark.parametrize("name", REFUSED_BACKWARD)
def test_a_raw_backward_call_that_would_read_out_of_bounds_is_refused(name):
    changes, message = REFUSED_BACKWARD[name]
    with pytest.raises(RuntimeError, match=re.escape(message)):
        ADDITIVE_RECURRENCE_TRITON_BACKWARD(
            *on_default_device(arguments(ADDITIVE_RECURRENCE_TRITON_BACKWARD, **changes))
        )


def on_default_device(values):
    """What a module made when it was imported was made on the CPU."""
    device = torch.get_default_device()
    return tuple(value.to(device) if isinstance(value, torch.Tensor) else value for value in values)
