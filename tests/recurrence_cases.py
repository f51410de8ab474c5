"""Named cases of the additive recurrence, running one forward and backward, and comparing it with the reference."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from attention_cases import DTYPES, shuffled
from tolerance import Comparison, assert_close_to_reference
from torch import Tensor

import sightline as sl

CAUSAL = pytest.mark.parametrize("causal", [True, False], ids=["causal", "unordered"])
EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
# Entries that are run again under every instruction set: what decides between the others is compiled alike for all.
ON_EVERY_ISA = partial(pytest.param, marks=pytest.mark.isa)

LARGEST_KEY = 2.5  # of random keys, before a ramp is added to them


@dataclass(frozen=True)
class Sizes:
    """B, H, Hk, N, Dk and Dv."""

    batch: int = 2
    heads: int = 4
    key_heads: int = 2
    length: int = 150
    width: int = 24
    value_width: int = 37

    def key_shape(self) -> tuple[int, int, int, int]:
        return self.batch, self.key_heads, self.length, self.width


@dataclass
class Problem:
    """Inputs of one call; `options` are those of `sightline.additive_recurrence`.

    ramp: what was added to random keys, as a test of keys that climb does.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    options: dict[str, Any] = field(default_factory=dict)
    ramp: Tensor | float = 0.0

    def in_float64(self) -> Problem:
        tensors = [tensor.double() for tensor in (self.query, self.key, self.value)]
        options = dict(self.options)
        if "key_gain" in options:
            options["key_gain"] = options["key_gain"].double()
        if "initial_state" in options:
            options["initial_state"] = sl.RecurrenceState(*(part.double() for part in options["initial_state"]))
        return Problem(*tensors, options)

    def redrawn(self, turn: int) -> Problem:
        """Every tensor of numbers with them in another order; the keys climb as they did."""
        order = torch.Generator(device=self.query.device).manual_seed(turn)
        key = (shuffled(self.key - self.ramp, order) + self.ramp).to(self.key.dtype)
        options = dict(self.options)
        if "key_gain" in options:
            options["key_gain"] = shuffled(options["key_gain"], order)
        if "initial_state" in options:
            options["initial_state"] = sl.RecurrenceState(*(shuffled(part, order) for part in options["initial_state"]))
        return Problem(shuffled(self.query, order), key, shuffled(self.value, order), options, self.ramp)

    def arranged(self, arrange: Callable[[Tensor], Tensor]) -> Problem:
        """Everything that has four axes and is no state in another memory layout; there must be a gain."""
        options = self.options | {"key_gain": arrange(self.options["key_gain"])}
        return Problem(arrange(self.query), arrange(self.key), arrange(self.value), options)

    def row_in_a_document(self) -> tuple[int, int, int, int]:
        """The last document but one, its begin and end, and a row in its middle, whose key takes part from now on."""
        cuts = self.options["cu_seqlens"].tolist()
        document = len(cuts) - 3
        begin, end = cuts[document : document + 2]
        row = (begin + end) // 2
        if "key_mask" in self.options:
            self.options["key_mask"][0, row] = True
        return document, begin, end, row


def random_state(sizes: Sizes, sequences: int) -> sl.RecurrenceState:
    return sl.RecurrenceState(
        torch.randn(sequences, sizes.key_heads, sizes.width),
        torch.randn(sequences, sizes.key_heads, sizes.width, sizes.value_width),
    )


def _cuts(sizes: Sizes) -> Tensor:
    """Offsets of four documents, one of them empty, with a row before and one after.

    Each is long enough for no key of it to dominate (see assert_results_are_close).
    """
    least = sizes.length // 5
    first = int(torch.randint(least, 2 * least, ()))
    second = int(torch.randint(3 * least, 4 * least, ()))
    return torch.tensor([1, first, first, second, sizes.length - 1], dtype=torch.int32)


def _left_padding(sizes: Sizes) -> Tensor:
    return torch.arange(sizes.length) >= torch.randint(0, sizes.length, (sizes.batch, 1))


# What each option looks like for given sizes. Those that pack documents want B = 1.
OPTIONS: dict[str, Callable[[Sizes], dict[str, Any]]] = {
    "plain": lambda s: {},
    "scale": lambda s: {"scale": -0.3},
    "gain": lambda s: {"key_gain": torch.randn(s.key_shape())},
    "state": lambda s: {"initial_state": random_state(s, s.batch)},
    "zero_state": lambda s: {
        "initial_state": sl.RecurrenceState(*(torch.zeros_like(part) for part in random_state(s, s.batch)))
    },
    "state_of_nothing": lambda s: {
        "initial_state": sl.RecurrenceState(
            torch.full((s.batch, s.key_heads, s.width), -math.inf),
            torch.zeros(s.batch, s.key_heads, s.width, s.value_width),
        )
    },
    "key_mask": lambda s: {"key_mask": torch.rand(s.batch, s.length) < 0.6},
    "strided_key_mask": lambda s: {"key_mask": (torch.rand(s.length, s.batch) < 0.6).T},
    "left_padding": lambda s: {"key_mask": _left_padding(s)},
    "nothing_takes_part": lambda s: {"key_mask": torch.zeros(s.batch, s.length, dtype=torch.bool)},
    "everything": lambda s: {
        "key_gain": torch.randn(s.key_shape()),
        "initial_state": random_state(s, s.batch),
        "key_mask": torch.rand(s.batch, s.length) < 0.8,
        "scale": 0.7,
    },
}
PACKINGS: dict[str, Callable[[Sizes], dict[str, Any]]] = {
    "documents": lambda s: {"cu_seqlens": _cuts(s)},
    "documents_with_states": lambda s: {
        "cu_seqlens": _cuts(s),
        "initial_state": random_state(s, 4),
        "key_mask": torch.rand(1, s.length) < 0.8,
        "key_gain": torch.randn(s.key_shape()),
    },
    "two_documents": lambda s: {
        "cu_seqlens": torch.tensor([0, s.length // 3, s.length], dtype=torch.int32),
        "initial_state": random_state(s, 2),
    },
}


def random_problem(
    sizes: Sizes, dtype: torch.dtype = torch.float32, *, ramp: Tensor | float = 0.0, **options: Any
) -> Problem:
    """Normal inputs; `ramp`, of a shape that broadcasts to the keys', is added to the keys.

    Keys weigh as their exponential does, so a rare one of five standard deviations would have the largest entry of some
    gradients to itself, and the element-wise rule would measure everything by how that one entry happens to be rounded.
    """
    keys = torch.randn(sizes.key_shape()).clamp_(-LARGEST_KEY, LARGEST_KEY)
    return Problem(
        torch.randn(sizes.batch, sizes.heads, sizes.length, sizes.width).to(dtype),
        (keys + ramp).to(dtype),
        torch.randn(sizes.batch, sizes.key_heads, sizes.length, sizes.value_width).to(dtype),
        options,
        ramp,
    )


def outputs(problem: Problem, backend: str) -> dict[str, Tensor]:
    output, state = sl.additive_recurrence(
        problem.query, problem.key, problem.value, output_final_state=True, backend=backend, **problem.options
    )
    return {"output": output, "log_normalizer": state.log_normalizer, "memory": state.memory}


def in_pieces(problem: Problem, cuts: Sequence[int], backend: str) -> dict[str, Tensor]:
    """The same from one call for each piece, of rows cuts[i] to cuts[i + 1], that goes on from the state before it."""
    state, pieces = problem.options.get("initial_state"), []
    for begin, end in itertools.pairwise(cuts):
        rows = slice(begin, end)
        options = problem.options | {"initial_state": state}
        if "key_gain" in options:
            options["key_gain"] = options["key_gain"][:, :, rows]
        if "key_mask" in options:
            options["key_mask"] = options["key_mask"][:, rows]
        piece = Problem(problem.query[:, :, rows], problem.key[:, :, rows], problem.value[:, :, rows], options)
        results = outputs(piece, backend)
        state = sl.RecurrenceState(results["log_normalizer"], results["memory"])
        pieces.append(results["output"])
    return {"output": torch.cat(pieces, 2), "log_normalizer": state.log_normalizer, "memory": state.memory}


def assert_light_keys_add_up(piece: int, backend: str) -> None:
    """Keys of a weight of e^-17 after a state of one of 1: less than what float32 resolves beside 1."""
    sizes = Sizes(batch=1, heads=2, key_heads=2, length=56, width=8, value_width=5)
    state = sl.RecurrenceState(torch.zeros(1, 2, 8), torch.zeros(1, 2, 8, 5))
    problem = random_problem(sizes, ramp=-17.0, initial_state=state)
    results = in_pieces(problem, range(0, sizes.length + 1, piece), backend)
    exact = outputs(problem.in_float64(), "reference")
    for name, tensor in results.items():
        assert (tensor - exact[name]).norm() < 1e-5 * exact[name].norm(), name


def run(problem: Problem, backend: str, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """The three outputs, and the gradients of everything that has one, for gradients of the outputs named."""
    leaves = {name: getattr(problem, name).detach().requires_grad_() for name in ("query", "key", "value")}
    options = dict(problem.options)
    if "key_gain" in options:
        leaves["key_gain"] = options["key_gain"] = options["key_gain"].detach().requires_grad_()
    if "initial_state" in options:
        parts = [part.detach().requires_grad_() for part in options["initial_state"]]
        options["initial_state"] = sl.RecurrenceState(*parts)
        leaves["initial log_normalizer"], leaves["initial memory"] = parts
    results = outputs(Problem(leaves["query"], leaves["key"], leaves["value"], options), backend)
    received = torch.autograd.grad(
        [results[name] for name in gradients],
        list(leaves.values()),
        [gradient.to(results[name].dtype) for name, gradient in gradients.items()],
        allow_unused=True,
        materialize_grads=True,
    )
    return {name: tensor.detach() for name, tensor in results.items()} | dict(zip(leaves, received, strict=True))


def random_gradients(problem: Problem) -> dict[str, Tensor]:
    """Of the three outputs, in the dtype of the query."""
    batch, heads, length, width = problem.query.shape
    documents = problem.options.get("cu_seqlens")
    sequences = batch if documents is None else len(documents) - 1
    channels, columns = (sequences, problem.key.shape[1], width), problem.value.shape[3]
    shapes = {
        "output": (batch, heads, length, columns),
        "log_normalizer": channels,
        "memory": (*channels, columns),
    }
    return {name: torch.randn(shape).to(problem.query) for name, shape in shapes.items()}


def assert_results_are_close(
    problem: Problem,
    gradients: dict[str, Tensor] | None = None,
    backend: str = "native",
    *,
    one_key_dominates: bool = False,
    with_nan: bool = False,
) -> dict[str, Tensor]:
    """Compare the outputs and every gradient with the float64 reference; the gradients are random unless given.

    one_key_dominates: one key of a sequence has almost all of its weight, as in a sequence of one or two. with_nan: NaN
    is expected, and where the reference has it alone.
    """
    one_key_dominates |= problem.key.shape[2] <= 2
    gradients = random_gradients(problem) if gradients is None else gradients

    def compare(problem: Problem, gradients: dict[str, Tensor]) -> dict[str, Comparison]:
        results = run(problem, backend, gradients)
        reference = run(problem.in_float64(), "reference", gradients)
        in_dtype = run(problem, "reference", gradients)
        assert results.keys() == reference.keys()
        for name, result in results.items():
            assert result.dtype == in_dtype[name].dtype, name
        sizes = {name: size_of(problem, name, gradients) for name in results}
        if with_nan:
            for name, tensor in reference.items():
                spoilt = tensor.isnan()
                assert torch.equal(results[name].isnan(), spoilt), f"{name}: NaN is not where the reference has it"
                for found in (results, reference, in_dtype, sizes):
                    found[name] = None if found[name] is None else found[name].masked_fill(spoilt, 0.0)
        return {name: Comparison(results[name], reference[name], in_dtype[name], sizes[name]) for name in results}

    def size_of(problem: Problem, name: str, gradients: dict[str, Tensor]) -> Tensor | None:
        return _size_without_cancellation(problem, name, gradients) if one_key_dominates else None

    def compare_again(name: str, turn: int) -> Comparison:
        order = torch.Generator(device=problem.query.device).manual_seed(turn)
        others = {key: shuffled(gradient, order) for key, gradient in gradients.items()}
        return compare(problem.redrawn(turn), others)[name]

    comparisons = compare(problem, gradients)
    for name, comparison in comparisons.items():
        assert_close_to_reference(
            comparison,
            name=name if name in gradients else f"gradient of {name}",
            dtype=problem.query.dtype,
            gradient=name not in gradients,
            redraw=partial(compare_again, name),
        )
    return {name: comparison.actual for name, comparison in comparisons.items()}


def assert_non_finite_keys_are_what_they_are_in_the_formula(
    number: float, sizes: Sizes, causal: bool, option: str, backend: str, dtype: torch.dtype = torch.float32
) -> None:
    """-inf is a key of no weight; NaN and +inf make NaN of what has weighed them, and of nothing else."""
    problem = random_problem(sizes, dtype, causal=causal, **OPTIONS[option](sizes))
    problem.key[0, -1, sizes.length // 2, sizes.width // 2] = number
    assert_results_are_close(problem, backend=backend, with_nan=number != -math.inf)


def assert_a_state_that_is_not_finite_stays_so(number: float, masked: bool, dtype: torch.dtype, backend: str) -> None:
    """Over a token that adds nothing (masked, or its keys -inf), however a sequence is cut."""
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[:, 2] = not masked
    problem = random_problem(Sizes(length=6), dtype, key_mask=mask)
    problem.key[0, 1, 1, 3] = number
    if not masked:
        problem.key[:, :, 2] = -math.inf
    whole = outputs(problem, backend)["output"].isfinite()
    assert not whole[0, 2:, 1:].any()
    assert whole[1].all()
    assert whole[0, :2].all()
    for cuts in (range(7), [0, 2, 3, 6], [0, 2, 3, 4, 6]):
        pieces = in_pieces(problem, cuts, backend)
        assert torch.equal(pieces["output"].isfinite(), whole)
        assert not pieces["log_normalizer"][0, 1, 3].isfinite()
        assert not pieces["memory"][0, 1, 3].isfinite().any()


def _size_without_cancellation(problem: Problem, name: str, gradients: dict[str, Tensor]) -> Tensor | None:
    """How large a gradient would be without what its normaliser takes back; None for gradients without a normaliser.

    Where one key holds all the weight, little remains of exp(x_t - z) gain_t (G v_t) when <G, S> is subtracted, and
    what is left is as exact as its terms, not as itself. The same holds for z of the initial state, with <S, G>.
    """
    if name not in ("key", "initial log_normalizer"):
        return None
    exact = problem.in_float64()
    exact.options.setdefault("key_gain", torch.ones_like(exact.key))
    received = run(exact, "reference", gradients)
    if name == "key":
        return (received["key_gain"] * exact.options["key_gain"]).abs()
    product = (received["initial memory"] * exact.options["initial_state"].memory).abs().sum(-1)
    return product + received["initial log_normalizer"].abs()
