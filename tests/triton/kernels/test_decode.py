"""Few rows against many keys without gradients: the keys are split, and the parts merged."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from attention_cases import DTYPES, OPTIONS, PACKINGS, SOFTMAX_OPTIONS, WEIGHTINGS, Problem, Sizes, random_problem, run
from attention_checks import assert_outputs_are_close

import sightline as sl
from sightline.triton import launch

SIZES = Sizes(batch=2, heads=4, key_heads=2, queries=3, keys=600, width=20, value_width=24)
# At most 64 rows of a key head are packed, over all documents.
PACKED_SIZES = Sizes(batch=1, heads=2, key_heads=1, queries=32, keys=600, width=20, value_width=24)
CHOSEN = (
    "causal",
    "causal_window",
    "causal_lengths",
    "no_length",
    "left_padding",
    "bool_mask",
    "blind_rows",
    "nothing_visible",
    "float_mask",
    "smallest_numbers",
    "causal_alibi",
    "scale_per_head",
    "dropout",
    "everything",
)


@pytest.fixture(autouse=True)
def splits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Into how many parts each call cut its keys, so that a test of decoding cannot pass by not decoding."""
    counted: list[int] = []
    decode = launch._decode

    def counting(problem: Any, variant: Any, parts: int, *arguments: Any) -> None:
        counted.append(parts)
        decode(problem, variant, parts, *arguments)

    monkeypatch.setattr(launch, "_decode", counting)
    return counted


def assert_decoding_is_close(problem: Problem, weighting: Any, splits: list[int]) -> dict[str, torch.Tensor]:
    results = assert_outputs_are_close(problem, weighting, lambda problem: run(problem, weighting, "triton"))
    assert splits, "the call was not decoding"
    assert splits[-1] > 1
    return results


@pytest.mark.parametrize("weighting", ["softmax", "lssa", "lssar"])
@pytest.mark.parametrize(("turn", "option"), list(enumerate(CHOSEN)))
def test_every_option(turn: int, option: str, weighting: str, splits: list[int]) -> None:
    dtype = list(DTYPES.values())[(turn + len(weighting)) % 3]
    problem = random_problem(SIZES, dtype, **OPTIONS[option](SIZES))
    assert_decoding_is_close(problem, WEIGHTINGS[weighting], splits)


@pytest.mark.parametrize("weighting", ["softmax", "lssa", "lssar"])
@pytest.mark.parametrize(("turn", "packing"), list(enumerate(PACKINGS)))
def test_packed_documents(turn: int, packing: str, weighting: str, splits: list[int]) -> None:
    dtype = list(DTYPES.values())[(turn + len(weighting)) % 3]
    problem = random_problem(PACKED_SIZES, dtype, **PACKINGS[packing](PACKED_SIZES))
    assert_decoding_is_close(problem, WEIGHTINGS[weighting], splits)


@pytest.mark.parametrize("option", SOFTMAX_OPTIONS)
def test_sinks(option: str, splits: list[int]) -> None:
    problem = random_problem(SIZES, torch.float32, **SOFTMAX_OPTIONS[option](SIZES))
    assert_decoding_is_close(problem, sl.Softmax(), splits)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("weighting", WEIGHTINGS.values(), ids=WEIGHTINGS.keys())
def test_one_row_of_grouped_heads(weighting: Any, dtype: torch.dtype, splits: list[int]) -> None:
    sizes = Sizes(2, 8, 1, 1, 700, 16, 16)
    problem = random_problem(sizes, dtype, causal=True, key_lengths=torch.tensor([700, 431]))
    assert_decoding_is_close(problem, weighting, splits)


def test_one_row_against_4097_keys(splits: list[int]) -> None:
    assert_decoding_is_close(random_problem(Sizes(1, 2, 1, 1, 4097, 16, 16), torch.float32), sl.LSSAR(), splits)


@pytest.mark.parametrize("weighting", [sl.Softmax(), sl.LSSAR()], ids=["softmax", "lssar"])
def test_a_value_that_is_not_finite_stays_with_those_who_see_it(weighting: Any, splits: list[int]) -> None:
    problem = random_problem(SIZES, torch.float32, key_lengths=torch.tensor([600, 500]))
    clean = run(problem, weighting, "triton")["output"]
    problem.value[:, 0, 550] = math.nan
    output = run(problem, weighting, "triton")["output"]
    assert len(splits) == 2
    torch.testing.assert_close(output[1], clean[1], rtol=0, atol=0)
    torch.testing.assert_close(output[0, 2:], clean[0, 2:], rtol=0, atol=0)
    if weighting.reweight is None:
        assert output[0, :2].isnan().all()


def test_decoding_twice_gives_the_same_bits() -> None:
    problem = random_problem(SIZES, torch.bfloat16, causal=True)
    first, second = (run(problem, sl.LSSAR(), "triton")["output"] for _ in range(2))
    assert torch.equal(first, second)
