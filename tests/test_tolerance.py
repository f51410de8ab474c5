"""What the tolerance rule takes for chance, and what it does not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_cases import MAIN_WEIGHTINGS, OPTIONS, Sizes, random_problem, run
from attention_checks import random_gradients, torch_in_another_order
from tolerance import DECISIVE_LEAD, ORDERS, Comparison, assert_close_to_reference
from torch import Tensor

REFERENCE = torch.linspace(1.0, 2.0, 100).double()
TORCH_ERROR = 1e-6
FAR = 40 * TORCH_ERROR  # Rule 2 allows 2 (1e-6 + 6e-8): missed by more than OUTLIER_FACTOR


def with_error(error: float) -> Tensor:
    """The reference with one entry that far off, in float32."""
    result = REFERENCE.clone()
    result[50] += error
    return result.float()


def draw(error: float) -> Comparison:
    return Comparison(with_error(error), REFERENCE, with_error(TORCH_ERROR))


def never(_: int) -> Comparison:
    raise AssertionError("drawn again")


def test_errors_of_torchs_size_pass_at_once() -> None:
    assert_close_to_reference(draw(1.5 * TORCH_ERROR), redraw=never)


def test_a_rule_missed_without_other_draws_fails() -> None:
    with pytest.raises(AssertionError, match="largest error"):
        assert_close_to_reference(draw(3 * TORCH_ERROR))


def test_a_rule_missed_once_passes_where_other_draws_hold_it() -> None:
    turns: list[int] = []

    def redraw(turn: int) -> Comparison:
        turns.append(turn)
        return draw(TORCH_ERROR)

    assert_close_to_reference(draw(4 * TORCH_ERROR), redraw=redraw)
    assert turns == list(range(DECISIVE_LEAD))


def test_a_rule_missed_by_most_draws_fails() -> None:
    with pytest.raises(AssertionError, match="other draws do too"):
        assert_close_to_reference(draw(4 * TORCH_ERROR), redraw=lambda turn: draw(4 * TORCH_ERROR))


def test_a_rule_missed_by_far_fails_though_other_draws_hold_it() -> None:
    with pytest.raises(AssertionError, match="largest error"):
        assert_close_to_reference(draw(FAR), redraw=lambda turn: draw(TORCH_ERROR))


def test_a_rule_missed_by_far_fails_where_torch_is_exact_in_every_order() -> None:
    with pytest.raises(AssertionError, match="largest error"):
        assert_close_to_reference(
            draw(FAR), redraw=lambda turn: draw(TORCH_ERROR), reorder=lambda turn: with_error(TORCH_ERROR)
        )


def test_a_rule_missed_by_far_is_chance_where_torch_misses_it_too_in_another_order() -> None:
    orders: list[int] = []

    def reorder(turn: int) -> Tensor:
        orders.append(turn)
        return with_error(FAR if turn == ORDERS // 2 else TORCH_ERROR)

    assert_close_to_reference(draw(FAR), redraw=lambda turn: draw(TORCH_ERROR), reorder=reorder)
    assert orders == list(range(ORDERS))


def test_what_is_chance_in_one_draw_fails_where_most_others_miss_the_rule() -> None:
    with pytest.raises(AssertionError, match="other draws do too"):
        assert_close_to_reference(draw(FAR), redraw=lambda turn: draw(FAR), reorder=lambda turn: with_error(FAR))


def test_nan_fails_however_often_it_is_drawn() -> None:
    with pytest.raises(AssertionError, match="NaN"):
        assert_close_to_reference(draw(float("nan")), redraw=never)


@pytest.mark.parametrize("option", ["causal", "float_mask", "dropout"])
@pytest.mark.parametrize("weighting", MAIN_WEIGHTINGS.values(), ids=MAIN_WEIGHTINGS.keys())
def test_another_order_of_channels_changes_nothing_but_rounding(weighting: Any, option: str) -> None:
    sizes = Sizes()
    problem = random_problem(sizes, torch.float64, **OPTIONS[option](sizes))
    gradients = random_gradients(problem)
    results = run(problem, weighting, "reference", *gradients)
    for name, expected in results.items():
        for turn in range(3):
            torch.testing.assert_close(torch_in_another_order(problem, weighting, gradients, name, turn), expected)
    assert not torch.equal(torch_in_another_order(problem, weighting, gradients, "query", 0), results["query"])
