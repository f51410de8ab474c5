"""Fit the minimax polynomials of csrc/core/polynomials.h and print them as C++.

They are fitted in relative error, in double precision:

* ``exp2``: 2^f = P(f) on f in [-1/2, 1/2], the short one on [0, 1]
* ``log2_1p``: log2(1 + y) = y * P(y) on y in [0, 1], so that the error stays relative as y goes to 0

Run ``python tools/fit_polynomials.py`` and paste the result; tests/csrc/test_elementwise.py measures what the kernels
make of it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np


def remez_relative(
    function: Callable[[np.ndarray], np.ndarray], low: float, high: float, degree: int
) -> tuple[np.ndarray, float]:
    """Coefficients (lowest first) of the polynomial that minimises max |P/f - 1|, and that error."""
    count = degree + 2
    nodes = (low + high) / 2 - (high - low) / 2 * np.cos(np.pi * np.arange(count) / (count - 1))
    grid = np.linspace(low, high, 200_001)
    coefficients = np.zeros(degree + 1)
    for _ in range(50):
        powers = np.vander(nodes, degree + 1, increasing=True) / function(nodes)[:, None]
        system = np.hstack([powers, ((-1.0) ** np.arange(count))[:, None]])
        coefficients = np.linalg.solve(system, np.ones(count))[:-1]
        error = np.polyval(coefficients[::-1], grid) / function(grid) - 1
        extrema = [0, *(np.flatnonzero((error[1:-1] - error[:-2]) * (error[2:] - error[1:-1]) <= 0) + 1), len(grid) - 1]
        alternating = [extrema[0]]
        for index in extrema[1:]:
            if np.sign(error[index]) == np.sign(error[alternating[-1]]):
                if abs(error[index]) > abs(error[alternating[-1]]):
                    alternating[-1] = index
            else:
                alternating.append(index)
        while len(alternating) > count:
            alternating.pop(0 if abs(error[alternating[0]]) < abs(error[alternating[-1]]) else -1)
        if len(alternating) < count or np.allclose(grid[alternating], nodes, atol=1e-12):
            break
        nodes = grid[alternating]
    return coefficients, float(np.abs(error).max())


def fit_through(
    function: Callable[[np.ndarray], np.ndarray], low: float, high: float, degree: int, exact: float
) -> tuple[np.ndarray, float]:
    """As remez_relative, of the polynomials that are exact at one point, by Lawson's reweighted least squares."""
    x = np.linspace(low, high, 4001)
    values, value = function(x), function(np.array([exact]))[0]
    # P(x) = f(exact) + (x - exact) Q(x), relative to f.
    system = ((x - exact)[:, None] * np.vander(x, degree, increasing=True)) / values[:, None]
    target = 1 - value / values
    weights = np.full(len(x), 1 / len(x))
    best, smallest = np.zeros(degree), np.inf
    for _ in range(2000):
        root = np.sqrt(weights)
        quotient = np.linalg.lstsq(system * root[:, None], target * root, rcond=None)[0]
        error = np.abs(system @ quotient - target)
        if error.max() < smallest:
            best, smallest = quotient, error.max()
        weights *= error
        weights /= weights.sum()
    coefficients = np.polynomial.polynomial.polymul([-exact, 1.0], best)
    coefficients[0] += value
    return coefficients, float(smallest)


def log2_1p_over_y(y: np.ndarray) -> np.ndarray:
    safe = np.where(y == 0, 1.0, y)
    return np.where(y == 0, 1.0 / np.log(2.0), np.log1p(safe) / (safe * np.log(2.0)))


def show(name: str, low: float, high: float, coefficients: np.ndarray, error: float) -> None:
    print(f"// degree {len(coefficients) - 1} on [{low}, {high}], relative error {error:.1e}")
    print(f"constexpr float {name}[] = {{{', '.join(f'{c:.9e}f' for c in coefficients)}}};")


def main() -> None:
    for name, function, low, high, degree in (
        ("kExp2", np.exp2, -0.5, 0.5, 6),
        ("kLog2OnePlus", log2_1p_over_y, 0.0, 1.0, 9),
    ):
        show(name, low, high, *remez_relative(function, low, high, degree))
    # The short ones give a row of one key its weight of 1 at score 0.
    for name, function, low, high, degree, exact in (
        ("kExp2", np.exp2, 0.0, 1.0, 5, 0.0),
        ("kLog2OnePlus", log2_1p_over_y, 0.0, 1.0, 7, 1.0),
    ):
        show(f"{name} (short)", low, high, *fit_through(function, low, high, degree, exact))


if __name__ == "__main__":
    main()
