"""Options that choose how scores become attention weights: frozen, hashable, serialisable, free of tensors.

The formulas behind them are sections 1 and 2 of MATH.md; sources: LSSA and LSSAR, arXiv 2501.13428; softmax scaled with
the logarithm of the length (SSMax), arXiv 2501.19399; the softcap of scores, arXiv 2408.00118.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, TypeAlias, get_args

# Beyond these float32 arithmetic has nothing left to compute with.
SMALLEST_SOFTCAP = 1e-6
LARGEST_SOFTCAP = 1e6
LARGEST_POWER = 1e4


def _check_flag(owner: str, name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{owner}.{name}: expected True or False, got {value!r}")


def _check_number(owner: str, name: str, value: object, expected: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{owner}.{name}: expected {expected}, got {value!r}")
    return float(value)


def _check_reweight(owner: str, value: object) -> None:
    if value is not None and not isinstance(value, Reweight):
        raise TypeError(f"{owner}.reweight: expected None or a Reweight, got {value!r}")


@dataclass(frozen=True)
class Reweight:
    """Sharpening of the weights of a row: W_ij proportional to ReLU(n_i a_ij - offset)^power.

    power: at least 1; 15 extrapolates in length, 3 is best at the training length.
    offset: what is taken off the weights before the power, in units of the row's mean weight; at least 0.
    exempt_rows: rows that see at most this many keys keep offset 0.

    Raises TypeError or ValueError naming the field. Source: LSSAR, arXiv 2501.13428.

    >>> Reweight(power=3)
    Reweight(power=3.0, offset=1.0, exempt_rows=3)
    """

    power: float = 15.0
    offset: float = 1.0
    exempt_rows: int = 3

    def __post_init__(self) -> None:
        power = _check_number("Reweight", "power", self.power, "a finite number of at least 1")
        offset = _check_number("Reweight", "offset", self.offset, "a finite number of at least 0")
        if not 1 <= power <= LARGEST_POWER:
            raise ValueError(f"Reweight.power: expected a number in [1, {LARGEST_POWER}], got {self.power!r}")
        if not (math.isfinite(offset) and offset >= 0):
            raise ValueError(f"Reweight.offset: expected a finite number of at least 0, got {self.offset!r}")
        if isinstance(self.exempt_rows, bool) or not isinstance(self.exempt_rows, int):
            raise TypeError(f"Reweight.exempt_rows: expected an integer of at least 0, got {self.exempt_rows!r}")
        if not 0 <= self.exempt_rows < 2**31:
            raise ValueError(f"Reweight.exempt_rows: expected an integer in [0, 2^31), got {self.exempt_rows!r}")
        object.__setattr__(self, "power", power)
        object.__setattr__(self, "offset", offset)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return {"power": self.power, "offset": self.offset, "exempt_rows": self.exempt_rows}


@dataclass(frozen=True)
class Softmax:
    """The exponential weight function exp(s), the attention of every existing model.

    length_scale: multiply scores by ln n_i, n_i the number of keys the row sees (with a `scale` per head: SSMax).
    normalize_qk: divide queries and keys by their norms; the default scale becomes ln D.
    softcap: bound the scores to (-softcap, softcap) by softcap * tanh(s / softcap); None leaves them alone.
    reweight: a `Reweight`, or None.

    Raises TypeError or ValueError naming the field.

    >>> Softmax(softcap=50)
    Softmax(length_scale=False, normalize_qk=False, softcap=50.0, reweight=None)
    """

    kind: ClassVar[str] = "softmax"

    length_scale: bool = False
    normalize_qk: bool = False
    softcap: float | None = None
    reweight: Reweight | None = None

    def __post_init__(self) -> None:
        _check_flag("Softmax", "length_scale", self.length_scale)
        _check_flag("Softmax", "normalize_qk", self.normalize_qk)
        if self.softcap is not None:
            softcap = _check_number("Softmax", "softcap", self.softcap, "None or a finite number above 0")
            if not (SMALLEST_SOFTCAP <= softcap <= LARGEST_SOFTCAP):
                raise ValueError(
                    f"Softmax.softcap: expected None or a number in [{SMALLEST_SOFTCAP}, {LARGEST_SOFTCAP}], "
                    f"got {self.softcap!r}"
                )
            object.__setattr__(self, "softcap", softcap)
        _check_reweight("Softmax", self.reweight)

    def to_dict(self) -> dict[str, Any]:
        """The options as JSON values; `weighting_from_dict` reads them back."""
        return _to_dict(self)


@dataclass(frozen=True)
class Softplus:
    """The softplus weight function log(1 + exp(s)) of length-scaled softplus attention (LSSA, arXiv 2501.13428).

    length_scale: multiply scores by ln n_i, n_i the number of keys the row sees.
    normalize_qk: divide queries and keys by their norms; the default scale becomes ln D.
    reweight: a `Reweight`, or None; with one it is LSSAR.

    Raises TypeError naming the field.

    >>> Softplus() == LSSA()
    True
    """

    kind: ClassVar[str] = "softplus"

    length_scale: bool = True
    normalize_qk: bool = True
    reweight: Reweight | None = None

    def __post_init__(self) -> None:
        _check_flag("Softplus", "length_scale", self.length_scale)
        _check_flag("Softplus", "normalize_qk", self.normalize_qk)
        _check_reweight("Softplus", self.reweight)

    def to_dict(self) -> dict[str, Any]:
        """The options as JSON values; `weighting_from_dict` reads them back."""
        return _to_dict(self)


def LSSA() -> Softplus:
    """Length-scaled softplus attention (arXiv 2501.13428): `Softplus()`.

    >>> LSSA().to_dict()
    {'kind': 'softplus', 'length_scale': True, 'normalize_qk': True, 'reweight': None}
    """
    return Softplus()


def LSSAR(power: float = 15.0) -> Softplus:
    """LSSA with re-weighting (arXiv 2501.13428): `Softplus(reweight=Reweight(power))`.

    >>> LSSAR(3).reweight
    Reweight(power=3.0, offset=1.0, exempt_rows=3)
    """
    return Softplus(reweight=Reweight(power))


Weighting: TypeAlias = Softmax | Softplus

# By kind, in the order of the operator's numbers (WeightFunction in csrc/core/weights.h).
WEIGHTINGS: dict[str, type[Weighting]] = {option_type.kind: option_type for option_type in get_args(Weighting)}
EXPECTED_WEIGHTING = f"a {', '.join(option_type.__name__ for option_type in WEIGHTINGS.values())}, LSSA() or LSSAR()"


def _to_dict(weighting: Weighting) -> dict[str, Any]:
    options = {field.name: getattr(weighting, field.name) for field in fields(weighting)}
    if weighting.reweight is not None:
        options["reweight"] = weighting.reweight.to_dict()
    return {"kind": weighting.kind, **options}


def _build(option_type: type[Any], name: str, options: Mapping[str, Any]) -> Any:
    known = [field.name for field in fields(option_type)]
    unknown = [option for option in options if option not in known]
    if unknown:
        raise ValueError(f"{name}: expected the options {', '.join(known)}, got {unknown[0]!r}")
    return option_type(**options)


def weighting_from_dict(options: Mapping[str, Any]) -> Weighting:
    """The weighting that `to_dict` wrote, for example from a JSON file; options that are missing take their defaults.

    Raises TypeError where `options` (or its "reweight") is no mapping, ValueError for an unknown kind or option.

    >>> weighting_from_dict({"kind": "softplus", "reweight": {"power": 3.0}}) == LSSAR(3)
    True
    """
    if not isinstance(options, Mapping):
        raise TypeError(f"weighting: expected a mapping as to_dict gives it, got {options!r}")
    remaining = dict(options)
    kind = remaining.pop("kind", None)
    if not isinstance(kind, str) or kind not in WEIGHTINGS:
        raise ValueError(f"weighting: expected kind to be one of {', '.join(WEIGHTINGS)}, got {kind!r}")
    reweight = remaining.get("reweight")
    if reweight is not None:
        if not isinstance(reweight, Mapping):
            raise TypeError(f"weighting.reweight: expected None or a mapping, got {reweight!r}")
        remaining["reweight"] = _build(Reweight, "weighting.reweight", reweight)
    weighting: Weighting = _build(WEIGHTINGS[kind], "weighting", remaining)
    return weighting
