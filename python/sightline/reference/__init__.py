"""The formulas of the library in plain PyTorch: the oracle of the tests and the backend of last resort.

Everything here is written to be read against the formulas, materialises what they name (the score matrix of attention)
and runs in any floating dtype up to float64. Nothing here depends on the rest of sightline.
"""

from __future__ import annotations

from sightline.reference.attention import attention, attention_weights
from sightline.reference.dropout import dropout_keep
from sightline.reference.recurrence import additive_recurrence

__all__ = ["additive_recurrence", "attention", "attention_weights", "dropout_keep"]
