"""The polynomials of csrc/core against float64 over their whole range, for every instruction set.

The sweeps hold 4096 evenly spaced mantissas of every binary exponent, so that no range of the argument is left out.
"""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest
from numpy.typing import NDArray

Floats = NDArray[np.float32]
SMALLEST_NORMAL = np.finfo(np.float32).tiny


def sweep(lowest: int, highest: int, *, below: float = np.inf, above: float = -np.inf) -> Floats:
    """Both signs of every exponent from lowest to highest, inside [above, below]."""
    mantissas = 1 + np.arange(4096) / 4096
    magnitudes = np.ldexp(mantissas, np.arange(lowest, highest + 1)[:, None]).ravel()
    x = np.concatenate([-magnitudes[::-1], [0.0], magnitudes]).astype(np.float32)
    return x[(x >= above) & (x <= below)]


def error_in_ulp(actual: Floats, expected: NDArray[np.float64]) -> float:
    spacing = np.spacing(np.maximum(np.abs(expected), SMALLEST_NORMAL).astype(np.float32)).astype(np.float64)
    return float((np.abs(actual.astype(np.float64) - expected) / spacing).max())


def relative_error(actual: Floats, expected: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.abs(actual.astype(np.float64) - expected) / np.abs(expected)


def test_exp2_is_within_1_2_ulp_from_minus_126_to_127(bench: ModuleType, isa: str) -> None:
    x = sweep(-126, 6, above=-126, below=127)
    assert error_in_ulp(bench.exp2(isa, x), np.exp2(x.astype(np.float64))) < 1.2


def test_exp2_is_within_1_2_ulp_around_every_half(bench: ModuleType, isa: str) -> None:
    # Where the argument is split into a whole number and a rest, on both sides of the rounding.
    halves = (np.arange(-125, 127) + 0.5).astype(np.float32)
    x = np.concatenate([halves, np.nextafter(halves, np.float32(-200)), np.nextafter(halves, np.float32(200))])
    assert error_in_ulp(bench.exp2(isa, x), np.exp2(x.astype(np.float64))) < 1.2


def test_exp2_of_whole_numbers_is_exact(bench: ModuleType, isa: str) -> None:
    x = np.arange(-126, 128).astype(np.float32)
    assert np.array_equal(bench.exp2(isa, x), np.ldexp(np.float32(1), x.astype(np.int32)))


def test_exp2_below_minus_126_is_exactly_zero(bench: ModuleType, isa: str) -> None:
    x = np.concatenate(
        [
            [np.nextafter(np.float32(-126), np.float32(-127)), -126.5, -149, -1e4, -1e30, -np.inf],
            sweep(7, 120, below=-128),
        ]
    )
    assert (bench.exp2(isa, x.astype(np.float32)) == 0).all()


def test_log2_one_plus_is_within_2_6_ulp_on_0_to_1(bench: ModuleType, isa: str) -> None:
    x = sweep(-126, 0, above=0, below=1)
    expected = np.log1p(x.astype(np.float64)) / np.log(2)
    assert error_in_ulp(bench.log2_one_plus(isa, x), expected) < 2.6


def test_short_exp2_has_a_relative_error_of_2e_7_and_none_at_whole_numbers(bench: ModuleType, isa: str) -> None:
    x = sweep(-126, 6, above=-126, below=127)
    assert relative_error(bench.exp2_short(isa, x), np.exp2(x.astype(np.float64))).max() < 2e-7
    whole = np.arange(-126, 128).astype(np.float32)
    assert np.array_equal(bench.exp2_short(isa, whole), np.ldexp(np.float32(1), whole.astype(np.int32)))
    assert (bench.exp2_short(isa, np.array([-126.5, -1e4, -1e30, -np.inf], np.float32)) == 0).all()


def test_short_log2_one_plus_has_a_relative_error_of_4e_7_and_none_at_1(bench: ModuleType, isa: str) -> None:
    x = sweep(-126, 0, above=2**-126, below=1)
    expected = np.log1p(x.astype(np.float64)) / np.log(2)
    assert relative_error(bench.log2_one_plus_short(isa, x), expected).max() < 4e-7
    assert np.array_equal(bench.log2_one_plus_short(isa, np.array([0, 1], np.float32)), [0, 1])


def test_tanh_is_within_2_8_ulp_everywhere(bench: ModuleType, isa: str) -> None:
    x = sweep(-126, 100)
    assert error_in_ulp(bench.tanh(isa, x), np.tanh(x.astype(np.float64))) < 2.8
    assert np.array_equal(bench.tanh(isa, np.array([np.inf, -np.inf], np.float32)), [1, -1])


def test_softplus_and_its_derivative_are_relatively_accurate_from_minus_80(bench: ModuleType, isa: str) -> None:
    score = sweep(-126, 100, above=-80)
    value, derivative = bench.softplus(isa, score)
    exact = score.astype(np.float64)
    decay = np.exp(-np.abs(exact))
    # Rounding s * log2(e) is an absolute error of the exponent: it grows with |s| where the result is an exponential.
    bound = 3e-7 + 9e-8 * np.maximum(-exact, 0)
    assert (relative_error(value, np.logaddexp(0, exact)) < bound).all()
    assert (relative_error(derivative, np.where(exact >= 0, 1, decay) / (1 + decay)) < bound).all()


def test_softplus_at_the_ends(bench: ModuleType, isa: str) -> None:
    value, derivative = bench.softplus(isa, np.array([-np.inf, -200, 0, 200, np.inf], np.float32))
    assert np.array_equal(value[[0, 1, 4]], [0, 0, np.inf])
    assert value[2:4] == pytest.approx([np.log(2), 200], rel=3e-7)
    assert derivative == pytest.approx([0, 0, 0.5, 1, 1], rel=3e-7)


@pytest.mark.parametrize(
    ("power", "bound"),
    [
        (1, 0),
        (2, 6e-8),
        (3, 1.3e-7),
        (14, 7e-7),
        (15, 7e-7),
        (63, 3.2e-6),
        (64, 3.2e-6),
        (0.5, 1.6e-6),
        (2.5, 7e-6),
        (14.5, 9e-6),
        (65, 1.1e-5),
        (100.5, 1.6e-5),
    ],
)
def test_power_is_relatively_accurate_on_0_to_1(bench: ModuleType, isa: str, power: float, bound: float) -> None:
    x = sweep(-126, 0, above=0, below=1)
    actual, expected = bench.power(isa, x, power), x.astype(np.float64) ** power
    normal = expected >= SMALLEST_NORMAL * (1 + 1e-5)
    assert (relative_error(actual[normal], expected[normal]) <= bound).all()
    # What is too small for a normal float is zero or the smallest one.
    assert (actual[~normal] <= SMALLEST_NORMAL * (1 + 1e-5)).all()
    assert (actual[~normal] >= 0).all()


def test_power_zero_is_one(bench: ModuleType, isa: str) -> None:
    assert (bench.power(isa, sweep(-126, 0, above=0, below=1), 0) == 1).all()


@pytest.mark.parametrize(
    "function",
    ["exp2", "log2_one_plus", "exp2_short", "log2_one_plus_short", "tanh", "softplus", "power 15", "power 2.5"],
)
def test_nan_stays_nan(bench: ModuleType, isa: str, function: str) -> None:
    name, *exponent = function.split()
    # Not a multiple of any vector width, so that a rest is computed too.
    x = np.linspace(0, 1, 37).astype(np.float32)
    x[[0, 5, 36]] = np.nan
    results = getattr(bench, name)(isa, x, *map(float, exponent))
    for result in results if isinstance(results, tuple) else (results,):
        assert np.array_equal(np.isnan(result), np.isnan(x))
