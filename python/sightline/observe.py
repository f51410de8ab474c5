"""What `sightline.attention` reports about itself: the request (`Observe`) and the answer (`AttentionStats`).

Every statistic is defined in section 3 of MATH.md; `windowed_distance` and `column_mass` are the WAAD and FAI
of arXiv 2510.13554.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

MAX_TOP_K = 16

_FLAGS = (
    "log_normalizer",
    "entropy",
    "max_score",
    "mean_score",
    "max_weight",
    "effective_keys",
    "distance",
    "weighted_value",
    "column_mass",
    "column_max",
    "column_entropy",
)
_COUNTS = ("sink_tokens", "top_k", "segments", "map_size")


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True)
class Observe:
    """Which statistics of the attention weights to compute; nothing by default.

    `sightline.attention` computes `log_normalizer` in this version, and raises NotImplementedError for the others.

    True asks for the statistic of that name:
    log_normalizer: ln Z_i in nats, the one statistic that carries gradients.
    entropy: of the weights of a row, in nats.
    max_score, mean_score: largest and mean score of the visible keys.
    max_weight: the largest weight and its key (`max_weight`, `max_key`).
    effective_keys: 1 / sum_j a_ij^2, in keys.
    distance: mean distance to the attended keys, in tokens.
    weighted_value: the mean of `value_weights` under the attention weights.
    column_mass, column_max, column_entropy: what a key receives from all queries.

    Numbers ask for a statistic of that size, 0 (or None) for none:
    sink_tokens: mass on the first so many keys that take part (`sink_mass`).
    top_k: the so many largest weights and their keys (`top_weights`, `top_keys`), at most 16.
    segments: mass on each of so many segments of keys, given as `key_segments` (`segment_mass`).
    map_size: attention pooled to that many cells per axis (`map`).
    distance_window: mean of min(distance, window), in tokens (`windowed_distance`).
    column_horizon: (lo, hi), restricts `column_mass` to pairs with lo <= pos_i - j <= hi.

    Raises TypeError or ValueError naming the field.

    >>> Observe(entropy=True, sink_tokens=4).requested()
    ('entropy', 'sink_tokens')
    """

    log_normalizer: bool = False
    entropy: bool = False
    max_score: bool = False
    mean_score: bool = False
    max_weight: bool = False
    effective_keys: bool = False
    distance: bool = False
    sink_tokens: int = 0
    top_k: int = 0
    segments: int = 0
    map_size: int = 0
    distance_window: int | None = None
    weighted_value: bool = False
    column_mass: bool = False
    column_max: bool = False
    column_entropy: bool = False
    column_horizon: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        for name in _FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"Observe.{name}: expected True or False, got {getattr(self, name)!r}")
        for name in _COUNTS:
            self._check_count(name, "an integer of at least 0")
        if self.top_k > MAX_TOP_K:
            raise ValueError(f"Observe.top_k: expected at most {MAX_TOP_K}, got {self.top_k}")
        if self.distance_window is not None:
            self._check_count("distance_window", "None or an integer of at least 0")
        if self.column_horizon is not None:
            self._check_horizon(self.column_horizon)

    def _check_count(self, name: str, expected: str) -> None:
        value = getattr(self, name)
        if not _is_integer(value):
            raise TypeError(f"Observe.{name}: expected {expected}, got {value!r}")
        if value < 0:
            raise ValueError(f"Observe.{name}: expected {expected}, got {value}")

    def _check_horizon(self, horizon: object) -> None:
        expected = "None or a pair of integers (lo, hi) with lo <= hi"
        if not isinstance(horizon, (tuple, list)) or not all(_is_integer(bound) for bound in horizon):
            raise TypeError(f"Observe.column_horizon: expected {expected}, got {horizon!r}")
        if len(horizon) != 2 or horizon[0] > horizon[1]:
            raise ValueError(f"Observe.column_horizon: expected {expected}, got {horizon!r}")
        # A list, as JSON gives it, would make the object unhashable.
        object.__setattr__(self, "column_horizon", tuple(horizon))

    def requested(self) -> tuple[str, ...]:
        """Names of the fields that differ from their defaults, in the order of declaration."""
        return tuple(name for name, default in _DEFAULTS if getattr(self, name) != default)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values: `Observe(**options)` reads them back.

        >>> Observe(**Observe(column_horizon=(1, 8)).to_dict())
        Observe(column_horizon=(1, 8))
        """
        options = {field.name: getattr(self, field.name) for field in fields(self)}
        if self.column_horizon is not None:
            options["column_horizon"] = list(self.column_horizon)
        return options

    def __repr__(self) -> str:
        return f"Observe({', '.join(f'{name}={getattr(self, name)!r}' for name in self.requested())})"


_DEFAULTS = tuple((field.name, field.default) for field in fields(Observe))


@dataclass(frozen=True, repr=False, eq=False)
class AttentionStats:
    """Statistics of attention, per query head; a field is None where it was not asked for.

    Row statistics are (B, H, M): log_normalizer and entropy (nats), max_score, mean_score, max_weight, max_key (int64),
    effective_keys (keys), sink_mass, distance and windowed_distance (tokens), weighted_value. top_weights and top_keys
    (int64) are (B, H, M, k), segment_mass is (B, H, M, S), map (B, H, P, P). Column statistics are (B, H, N):
    column_mass, column_count, column_max, column_entropy (nats). log_normalizer carries gradients, the rest do not.

    It is a pytree: torch.compile, torch.export and `torch.utils.checkpoint` take it apart and put it together again.

    >>> import torch
    >>> AttentionStats(entropy=torch.zeros(1, 8, 128))
    AttentionStats(entropy=(1, 8, 128) float32)
    """

    log_normalizer: Tensor | None = None
    entropy: Tensor | None = None
    max_score: Tensor | None = None
    mean_score: Tensor | None = None
    max_weight: Tensor | None = None
    max_key: Tensor | None = None
    effective_keys: Tensor | None = None
    sink_mass: Tensor | None = None
    distance: Tensor | None = None
    windowed_distance: Tensor | None = None
    weighted_value: Tensor | None = None
    top_weights: Tensor | None = None
    top_keys: Tensor | None = None
    segment_mass: Tensor | None = None
    map: Tensor | None = None
    column_mass: Tensor | None = None
    column_count: Tensor | None = None
    column_max: Tensor | None = None
    column_entropy: Tensor | None = None

    def __repr__(self) -> str:
        present = ((name, getattr(self, name)) for name in FIELDS if getattr(self, name) is not None)
        return f"AttentionStats({', '.join(f'{name}={_describe(value)}' for name, value in present)})"


FIELDS = tuple(field.name for field in fields(AttentionStats))


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    return repr(value)


# The tree carries the fields that are there: what maps over a tree (vmap, torch.func) takes tensors alone. Its context
# names them, so that an exported program of a version with other fields is refused instead of being read wrongly.
def _present(stats: AttentionStats) -> list[str]:
    return [name for name in FIELDS if getattr(stats, name) is not None]


def _flatten(stats: AttentionStats) -> tuple[list[Any], list[str]]:
    names = _present(stats)
    return [getattr(stats, name) for name in names], names


def _flatten_with_keys(stats: AttentionStats) -> tuple[list[tuple[pytree.KeyEntry, Any]], list[str]]:
    values, names = _flatten(stats)
    return [(pytree.GetAttrKey(name), value) for name, value in zip(names, values, strict=True)], names


def _unflatten(values: Any, names: list[str]) -> AttentionStats:
    return AttentionStats(**dict(zip(names, values, strict=True)))


pytree.register_pytree_node(
    AttentionStats,
    _flatten,
    _unflatten,
    serialized_type_name="sightline.AttentionStats",
    flatten_with_keys_fn=_flatten_with_keys,
)
