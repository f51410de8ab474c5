"""What the tolerance rule takes for chance, and what it does not."""

from __future__ import annotations

import pytest
import torch
from tolerance import DECISIVE_LEAD, Comparison, assert_close_to_reference
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


def test_nan_fails_however_often_it_is_drawn() -> None:
    with pytest.raises(AssertionError, match="NaN"):
        assert_close_to_reference(draw(float("nan")), redraw=never)
