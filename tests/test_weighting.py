from __future__ import annotations

import json
from dataclasses import FrozenInstanceError
from typing import Any

import pytest

from sightline.weighting import LSSA, LSSAR, Reweight, Softmax, Softplus, weighting_from_dict

WEIGHTINGS = [
    Softmax(),
    Softmax(length_scale=True, normalize_qk=True, softcap=30.0, reweight=Reweight(2.0, 0.5, 7)),
    Softplus(length_scale=False, normalize_qk=False),
    LSSA(),
    LSSAR(),
    LSSAR(3),
]


def test_defaults_are_those_of_the_papers() -> None:
    assert Softmax() == Softmax(length_scale=False, normalize_qk=False, softcap=None, reweight=None)
    assert LSSA() == Softplus() == Softplus(length_scale=True, normalize_qk=True, reweight=None)
    assert LSSAR() == Softplus(reweight=Reweight(power=15.0, offset=1.0, exempt_rows=3))
    assert LSSAR(3) == Softplus(reweight=Reweight(3.0))


@pytest.mark.parametrize("weighting", WEIGHTINGS, ids=repr)
def test_json_round_trip_gives_an_equal_weighting(weighting: Any) -> None:
    restored = weighting_from_dict(json.loads(json.dumps(weighting.to_dict())))
    assert restored == weighting
    assert hash(restored) == hash(weighting)
    assert type(restored) is type(weighting)


def test_weightings_tell_each_other_apart() -> None:
    assert len(set(WEIGHTINGS)) == len(WEIGHTINGS)
    assert Softmax(length_scale=True, normalize_qk=True) != Softplus()


@pytest.mark.parametrize("weighting", [Softmax(), Softplus(), Reweight()], ids=repr)
def test_options_cannot_be_changed(weighting: Any) -> None:
    with pytest.raises(FrozenInstanceError):
        weighting.reweight = None
    with pytest.raises(FrozenInstanceError):
        weighting.power = 2.0


def test_numbers_become_floats_so_that_equal_options_are_equal_in_json() -> None:
    assert isinstance(Reweight(power=3, offset=0).power, float)
    assert isinstance(Reweight(power=3, offset=0).offset, float)
    assert isinstance(Softmax(softcap=50).softcap, float)


@pytest.mark.parametrize(
    ("option_type", "options", "error"),
    [
        (Reweight, {"power": 0.99}, ValueError),
        (Reweight, {"power": float("nan")}, ValueError),
        (Reweight, {"power": float("inf")}, ValueError),
        (Reweight, {"power": "15"}, TypeError),
        (Reweight, {"power": True}, TypeError),
        (Reweight, {"power": None}, TypeError),
        (Reweight, {"offset": -0.1}, ValueError),
        (Reweight, {"offset": float("nan")}, ValueError),
        (Reweight, {"offset": float("inf")}, ValueError),
        (Reweight, {"offset": None}, TypeError),
        (Reweight, {"offset": False}, TypeError),
        (Reweight, {"exempt_rows": -1}, ValueError),
        (Reweight, {"exempt_rows": 3.0}, TypeError),
        (Reweight, {"exempt_rows": True}, TypeError),
        (Softmax, {"length_scale": 1}, TypeError),
        (Softmax, {"normalize_qk": None}, TypeError),
        (Softmax, {"softcap": 0.0}, ValueError),
        (Softmax, {"softcap": -3.0}, ValueError),
        (Softmax, {"softcap": float("nan")}, ValueError),
        (Softmax, {"softcap": float("inf")}, ValueError),
        (Softmax, {"softcap": "30"}, TypeError),
        (Softmax, {"softcap": True}, TypeError),
        (Softmax, {"reweight": 15.0}, TypeError),
        (Softmax, {"reweight": {"power": 15.0}}, TypeError),
        (Softplus, {"length_scale": "yes"}, TypeError),
        (Softplus, {"normalize_qk": 0}, TypeError),
        (Softplus, {"reweight": True}, TypeError),
    ],
)
def test_bad_options_are_refused_by_name(option_type: Any, options: dict[str, Any], error: type[Exception]) -> None:
    (name,) = options
    with pytest.raises(error, match=rf"^{option_type.__name__}\.{name}: expected .*, got "):
        option_type(**options)


@pytest.mark.parametrize("power", [0, float("nan")])
def test_lssar_checks_its_power(power: float) -> None:
    with pytest.raises(ValueError, match="power"):
        LSSAR(power)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ("softmax", TypeError, "weighting: expected a mapping"),
        (None, TypeError, "weighting: expected a mapping"),
        ({}, ValueError, "kind"),
        ({"kind": "sigmoid"}, ValueError, "'sigmoid'"),
        ({"kind": ["softmax"]}, ValueError, "kind"),
        ({"kind": "softplus", "softcap": 3.0}, ValueError, "'softcap'"),
        ({"kind": "softmax", "reweight": 3.0}, TypeError, "weighting.reweight"),
        ({"kind": "softmax", "reweight": {"strength": 3.0}}, ValueError, "'strength'"),
        ({"kind": "softmax", "reweight": {"power": 0.5}}, ValueError, "Reweight.power"),
        ({"kind": "softmax", "length_scale": "true"}, TypeError, "Softmax.length_scale"),
    ],
)
def test_bad_dictionaries_are_refused(options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        weighting_from_dict(options)


def test_reading_a_dictionary_leaves_it_alone() -> None:
    options = LSSAR().to_dict()
    weighting_from_dict(options)
    assert options == LSSAR().to_dict()
