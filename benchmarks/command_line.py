"""What the benchmarks of this folder share: arguments, progress, and the JSON document that each writes."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import torch

from sightline.cli.environment import describe_device, instruction_sets, versions

RESULTS = Path(__file__).parent / "results"
CPU = torch.device("cpu")


def say(message: str) -> None:
    """Progress, one line per step on stderr."""
    print(message, file=sys.stderr, flush=True)


def positive_integers(text: str) -> list[int]:
    """Whole numbers of at least 1 separated by commas."""
    numbers = [int(part) for part in text.split(",")]
    if min(numbers) < 1:
        raise ValueError(text)
    return numbers


def whole_numbers(text: str) -> list[int]:
    """`positive_integers`, or none."""
    return positive_integers(text) if text else []


def write_document(schema: str, found: dict[str, Any], *, device: torch.device = CPU, name: str | None = None) -> None:
    """Write `found`, with what measured it, to results/ and print the path.

    schema: "sightline-KIND/VERSION". name: of the file, by default made of kind, device and, on a CPU, instruction set.
    """
    described, isa = describe_device(device), instruction_sets()
    document = {
        "schema": schema,
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "device": described,
        "versions": versions(),
        "instruction_set": isa,
        **found,
    }
    chosen = isa["chosen"] if device.type == "cpu" else ""
    kind = schema.removeprefix("sightline-").partition("/")[0]
    name = name or re.sub(r"[^a-z0-9]+", "_", f"{kind} {described['name']} {chosen}".lower()).strip("_")
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(document, indent=1) + "\n")
    print(path)
