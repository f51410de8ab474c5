"""Checks of sizes and options that are plain Python values: every error begins with the name of the argument."""

from __future__ import annotations

from typing import Any

import torch

from sightline._checks import _LARGEST_SCALE, _wrong_type


def check_count(name: str, number: Any) -> None:
    if isinstance(number, bool) or not isinstance(number, (int, torch.SymInt)):
        raise _wrong_type(name, "a whole number of at least 1", number)
    if number < 1:
        raise ValueError(f"{name}: expected a whole number of at least 1, got {number}")


def check_divisor(name: str, size: Any, whole_name: str, whole: int) -> None:
    check_count(name, size)
    if whole % size != 0:
        raise ValueError(f"{name}: expected a divisor of {whole_name} = {whole}, got {size}")


def check_number(name: str, number: Any, least: float = 0) -> None:
    expected = f"a number from {least} to {_LARGEST_SCALE}"
    if isinstance(number, bool) or not isinstance(number, (int, float)):
        raise _wrong_type(name, expected, number)
    if not least <= number <= _LARGEST_SCALE:
        raise ValueError(f"{name}: expected {expected}, got {number}")


def check_flag(name: str, flag: Any) -> None:
    if not isinstance(flag, bool):
        raise _wrong_type(name, "True or False", flag)
