"""Every option, forward and backward. Each case gets the dtype of its turn: the interpreter has no time for all."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import pytest
import torch
from attention_cases import DTYPES, OPTIONS, PACKINGS, SOFTMAX_OPTIONS, WEIGHTINGS, Sizes, random_problem, run
from attention_checks import assert_results_are_close, random_gradients

from sightline.ops.backends import INTERPRETS_TRITON
from sightline.triton import launch

SIZES = Sizes(batch=2, heads=2, key_heads=1, queries=40, keys=70, width=20, value_width=24)
PACKED_SIZES = Sizes(batch=1, heads=2, key_heads=1, queries=70, keys=90, width=16, value_width=16)

assert_triton_is_close = partial(assert_results_are_close, backend="triton", outputs=True)


def in_turn(*axes: Any) -> list[Any]:
    """The product of the axes, each entry with the next dtype."""
    entries = list(itertools.product(*axes))
    names = itertools.cycle(DTYPES)
    return [
        pytest.param(*entry, name, id="-".join((*entry, name))) for entry, name in zip(entries, names, strict=False)
    ]


@pytest.mark.parametrize(("option", "weighting", "dtype"), in_turn(OPTIONS, ["softmax", "capped", "lssa", "lssar"]))
def test_every_option(option: str, weighting: str, dtype: str) -> None:
    problem = random_problem(SIZES, DTYPES[dtype], **OPTIONS[option](SIZES))
    assert_triton_is_close(problem, WEIGHTINGS[weighting])


@pytest.mark.parametrize(("option", "weighting", "dtype"), in_turn(SOFTMAX_OPTIONS, ["softmax", "cosine"]))
def test_sinks(option: str, weighting: str, dtype: str) -> None:
    problem = random_problem(SIZES, DTYPES[dtype], **SOFTMAX_OPTIONS[option](SIZES))
    assert_triton_is_close(problem, WEIGHTINGS[weighting])


@pytest.mark.parametrize(("packing", "weighting", "dtype"), in_turn(PACKINGS, ["softmax", "lssa", "lssar", "lssar2.5"]))
def test_packed_documents(packing: str, weighting: str, dtype: str) -> None:
    problem = random_problem(PACKED_SIZES, DTYPES[dtype], **PACKINGS[packing](PACKED_SIZES))
    assert_triton_is_close(problem, WEIGHTINGS[weighting])


@pytest.mark.parametrize(("weighting", "dtype"), in_turn(["lssa", "cosine", "lssar"]))
def test_norms_of_keys_taken_once_are_those_that_every_program_would_take(
    weighting: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = random_problem(SIZES, DTYPES[dtype], causal=True, key_lengths=torch.tensor([70, 33]))
    gradients = random_gradients(problem)
    measured: list[torch.Tensor] = []
    measure = launch.with_key_norms

    def measuring(*arguments: Any) -> Any:
        found = measure(*arguments)
        measured.append(found.inverse_key_norms)
        return found

    monkeypatch.setattr(launch, "with_key_norms", measuring)
    once = run(problem, WEIGHTINGS[weighting], "triton", *gradients)
    assert len(measured) == (1 if dtype == "fp32" else 2)
    torch.testing.assert_close(measured[0], 1.0 / problem.key.float().norm(dim=-1))
    monkeypatch.setattr(launch, "with_key_norms", lambda problem, *others: problem)
    every_time = run(problem, WEIGHTINGS[weighting], "triton", *gradients)
    for name in once:
        if INTERPRETS_TRITON:
            assert torch.equal(once[name], every_time[name]), name
        else:
            torch.testing.assert_close(once[name], every_time[name])


@pytest.mark.parametrize(
    ("full_axes", "weighting", "dtype"), in_turn(["", "n", "m", "hn", "bhm", "mn", "bhn", "hmn"], ["softmax", "lssar"])
)
def test_every_shape_of_a_float_mask(full_axes: str, weighting: str, dtype: str) -> None:
    shape = [size if axis in full_axes else 1 for axis, size in zip("bhmn", SIZES.scores(), strict=True)]
    mask = torch.randn(shape)
    if "n" in full_axes:
        mask = mask.masked_fill(torch.rand(shape) < 0.2, -torch.inf)
    mask = mask.to(DTYPES[dtype] if len(full_axes) % 2 else torch.float32)
    assert_triton_is_close(random_problem(SIZES, DTYPES[dtype], attn_mask=mask, causal=True), WEIGHTINGS[weighting])
