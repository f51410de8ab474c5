"""The examples in the docstrings of sl.models."""

from __future__ import annotations

import doctest
import importlib

import pytest


@pytest.mark.parametrize(
    "name", ["lightnet", "lightnet_cache", "lightnet_config", "lightnet_convert", "lightnet_image"]
)
def test_doctests(name):
    failures, tests = doctest.testmod(importlib.import_module(f"sightline.models.{name}"))
    assert tests > 0
    assert failures == 0
