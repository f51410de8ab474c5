"""The tolerance rule for whole models, whose other draws are models with the same weights in another order."""

from __future__ import annotations

import copy

import torch
from attention_cases import shuffled
from tolerance import Comparison, assert_close_to_reference


def assert_model_is_close(model, compare, **rule):
    """Hold what `compare` makes of the model, a Comparison, to the tolerance rule. `compare` may change the model."""
    untouched = copy.deepcopy(model)

    def compare_again(turn: int) -> Comparison:
        order = torch.Generator().manual_seed(turn)
        other = copy.deepcopy(untouched)
        with torch.no_grad():
            for weights in other.parameters():
                if weights.dim() > 1:
                    weights.copy_(shuffled(weights, order))
        return compare(other)

    assert_close_to_reference(compare(model), redraw=compare_again, **rule)
