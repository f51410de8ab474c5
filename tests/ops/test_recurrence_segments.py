"""What the recurrence's kernels cut long sequences into, and what several threads share: nothing depends on either."""

from __future__ import annotations

import itertools
import math
from functools import partial

import pytest
import torch
from recurrence_cases import (
    CAUSAL,
    EVERY_DTYPE,
    ON_EVERY_ISA,
    OPTIONS,
    PACKINGS,
    Sizes,
    assert_results_are_close,
    outputs,
    random_gradients,
    random_problem,
    run,
)
from tolerance import Comparison, assert_close_to_reference

import sightline as sl

CLIMBING = pytest.mark.parametrize(
    ("option", "step"),
    list(itertools.product(["plain", "everything", "documents_with_states", "two_documents"], [0.0, 25.0])),
)


def in_threads(problem, gradients):
    """The results of one, two and sixteen threads."""
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 16):
            torch.set_num_threads(threads)
            results.append(run(problem, "native", gradients))
    finally:
        torch.set_num_threads(before)
    return results


def test_accuracy_does_not_fall_with_the_length():
    sizes = Sizes(batch=1, heads=1, key_heads=1, length=100_000, width=4, value_width=4)
    problem = random_problem(sizes)
    output = outputs(problem, "native")["output"].double()
    weights = problem.key.double().exp()
    memory = (weights[..., None] * problem.value.double()[..., None, :]).cumsum(2)
    expected = torch.einsum("bhtd,bhtde->bhte", problem.query.double() / weights.cumsum(2), memory)
    late = slice(90_000, None)
    error = (output - expected)[:, :, late].norm() / expected[:, :, late].norm()
    assert error < 1e-5


def test_a_long_sequence_goes_back_segment_by_segment():
    """Longer than what the backward pass keeps of its rows at once (16384)."""
    sizes = Sizes(batch=1, heads=1, key_heads=1, length=40_000, width=3, value_width=2)
    problem = random_problem(sizes, **OPTIONS["state"](sizes))
    whole = run(problem, "native", {"output": torch.ones(1, 1, 40_000, 2)})
    # The same in pieces, which autograd puts together.
    leaves = [tensor.clone().requires_grad_() for tensor in (problem.query, problem.key, problem.value)]
    initial = [part.clone().requires_grad_() for part in problem.options["initial_state"]]
    state, pieces = sl.RecurrenceState(*initial), []
    for begin in range(0, 40_000, 7_000):
        piece = [leaf[:, :, begin : begin + 7_000] for leaf in leaves]
        output, state = sl.additive_recurrence(*piece, initial_state=state, output_final_state=True)
        pieces.append(output)
    gradients = torch.autograd.grad(torch.cat(pieces, 2).sum(), [*leaves, *initial])
    torch.testing.assert_close(whole["output"], torch.cat(pieces, 2), rtol=1e-5, atol=1e-5)
    for name, gradient in zip(
        ("query", "key", "value", "initial log_normalizer", "initial memory"), gradients, strict=True
    ):
        error = (whole[name] - gradient).norm() / gradient.norm()
        assert error < 3e-5, name


def unordered_formula(problem, gradients):
    """What run() gives without order, from the softmax over all rows, in the problem's dtype."""
    names = ("query", "key", "value", "key_gain", "log_normalizer", "memory")
    width, columns = problem.key.shape[3], problem.value.shape[3]
    nothing = torch.full((1, 1, width), -math.inf), torch.zeros(1, 1, width, columns)
    z, memory = problem.options.get("initial_state") or nothing
    gain = problem.options.get("key_gain", torch.ones_like(problem.key))
    given = (problem.query, problem.key, problem.value, gain, z, memory)
    wide = torch.promote_types(problem.query.dtype, torch.float32)
    leaves = [tensor.detach().to(tensor.dtype).requires_grad_() for tensor in given]
    query, key, value, gain, z, memory = (tensor.to(wide) for tensor in leaves)
    if "key_mask" in problem.options:
        key = key.masked_fill(~problem.options["key_mask"][:, None, :, None], -math.inf)
    total = torch.cat([key, z.unsqueeze(2)], 2).logsumexp(2)
    final = (z - total).exp().unsqueeze(3) * memory + ((key - total.unsqueeze(2)).exp() * gain).mT @ value
    output = (problem.options.get("scale", 1.0) * query @ final).to(problem.query.dtype)
    results = {"output": output, "log_normalizer": total, "memory": final}
    pairs = [(results[name], gradients[name].to(results[name].dtype)) for name in results]
    received = torch.autograd.grad([pair[0] for pair in pairs], leaves, [pair[1] for pair in pairs])
    found = dict(zip(names, received, strict=True))
    found |= {f"initial {name}": found.pop(name) for name in ("log_normalizer", "memory")}
    return found | {name: tensor.detach() for name, tensor in results.items()}


@pytest.mark.parametrize("option", ["plain", ON_EVERY_ISA("everything")])
@EVERY_DTYPE
def test_a_long_sequence_without_order_goes_segment_by_segment(dtype, option):
    """Several times as long as the shortest segment (2048), with keys that climb from one to the next.

    A state weighs as much as all keys together: of channels where it weighed a thousandth, the gradient of its z would
    be compared in the few that fall alone, and so with the error that torch makes in them by chance.
    """
    sizes = Sizes(batch=1, heads=2, key_heads=1, length=6_500, width=24, value_width=20)
    ramp = torch.arange(6_500.0)[:, None] * torch.tensor([0, 0, 0, 5e-3, 2e-2, -2e-2]).repeat(4)
    problem = random_problem(sizes, dtype, causal=False, ramp=ramp, **OPTIONS[option](sizes))
    if "initial_state" in problem.options:
        problem.options["initial_state"].log_normalizer.add_(math.log(sizes.length))
    gradients = random_gradients(problem)
    first, *others = in_threads(problem, gradients)
    for other in others:
        assert all(torch.equal(tensor, first[name]) for name, tensor in other.items())

    def compare(name, problem):
        exact, in_dtype = (unordered_formula(given, gradients)[name] for given in (problem.in_float64(), problem))
        return Comparison(run(problem, "native", gradients)[name], exact, in_dtype)

    for name in first:
        redraw = partial(lambda name, turn: compare(name, problem.redrawn(turn)), name)
        is_gradient = name not in gradients
        assert_close_to_reference(compare(name, problem), name=name, dtype=dtype, gradient=is_gradient, redraw=redraw)


@pytest.mark.parametrize("shape", [(2, 4, 2), (1, 1, 1), (1, 4, 2)], ids=str)
@pytest.mark.parametrize("value_width", [96, 100])
@CAUSAL
@EVERY_DTYPE
def test_results_do_not_depend_on_the_number_of_threads(shape, value_width, dtype, causal):
    sizes = Sizes(*shape, length=600, width=32, value_width=value_width)
    problem = random_problem(sizes, dtype, causal=causal)
    problem.value[0, 0, 40, 70] = math.inf  # in one block of columns alone
    gradients = random_gradients(problem)
    results = in_threads(problem, gradients)
    for other in results[1:]:
        for name, tensor in other.items():
            torch.testing.assert_close(tensor, results[0][name], rtol=0, atol=0, equal_nan=True, msg=name)


def climbing_problem(sizes, dtype, option, step):
    """A tenth of the channels climbs by `step` in 100 rows."""
    ramp = (torch.rand(sizes.width) < 0.1) * step / 100 * torch.arange(float(sizes.length))[:, None]
    return random_problem(sizes, dtype, ramp=ramp, **(OPTIONS | PACKINGS)[option](sizes))


@pytest.mark.isa
@CLIMBING
@EVERY_DTYPE
def test_few_heads_shared_by_all_threads_give_what_one_thread_gives(dtype, option, step):
    """Several windows of chunks, of channels in up to three blocks, with keys that cut chunks short."""
    sizes = Sizes(batch=1, heads=2, key_heads=1, length=2_100, width=70, value_width=37)
    problem = climbing_problem(sizes, dtype, option, step)
    problem.key[0, 0, 700] += 40.0
    problem.value[0, 0, 900, 3] = math.inf
    first, *others = in_threads(problem, random_gradients(problem))
    for other in others:
        for name, tensor in other.items():
            torch.testing.assert_close(tensor, first[name], rtol=0, atol=0, equal_nan=True, msg=name)


@CLIMBING
@EVERY_DTYPE
def test_one_head_on_several_threads(dtype, option, step):
    """Against the reference, in windows (513 rows of a sequence are enough; documents have fewer)."""
    sizes = Sizes(batch=1, heads=1, key_heads=1, length=580, width=34, value_width=20)
    problem = climbing_problem(sizes, dtype, option, step)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(6)
        assert_results_are_close(problem)
    finally:
        torch.set_num_threads(before)
