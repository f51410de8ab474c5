"""Checks that a transformers is installed whose mask functions are told where queries and keys begin."""

from __future__ import annotations

import importlib.metadata
import re

OLDEST = (5, 4)


def check(version: str | None) -> None:
    """Raise ImportError, naming the remedy, for a transformers of this version that does not serve; None: missing.

    >>> check("5.23.0")
    """
    oldest = ".".join(map(str, OLDEST))
    if version is None:
        raise ModuleNotFoundError("transformers is missing: pip install sightline[hf]", name="transformers")
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < OLDEST:
        raise ImportError(f"sightline needs transformers {oldest} or newer, got {version}", name="transformers")


def installed_version() -> str | None:
    """The version of transformers, None where it is not installed."""
    try:
        return importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        return None


check(installed_version())
