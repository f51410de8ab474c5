"""What the examples share: arguments, progress, results, and a clean end when interrupted."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sightline.cli.environment import instruction_sets, processor_name, versions

RESULTS = Path(__file__).parent / "results"
_last_line = time.monotonic()


def parser(description: str, steps: int) -> argparse.ArgumentParser:
    """The arguments that every example has."""
    arguments = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    arguments.add_argument("--steps", type=int, default=steps, help="training steps (lengths: repetitions)")
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--threads", type=int, default=2)
    arguments.add_argument("--output", type=Path, default=RESULTS, help="folder of the JSON and the PNG")
    return arguments


def progress(text: str) -> None:
    """A line on standard error that the next one replaces; where nobody is watching, one every ten seconds."""
    global _last_line
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
    elif text and time.monotonic() - _last_line > 10:
        print(text, file=sys.stderr, flush=True)
        _last_line = time.monotonic()


def finish_line(text: str) -> None:
    """A line that stays."""
    progress("")
    print(text, flush=True)


def cosine_schedule(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """Warm up over a twentieth of the steps, then fall to 5 % along a cosine."""
    warmup = max(1, steps // 20)
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, 0.05 + 0.95 * (1 + math.cos(math.pi * step / steps)) / 2),
    )


def environment(arguments: argparse.Namespace) -> dict[str, Any]:
    """What a result needs to be read, or repeated."""
    given = {name: value for name, value in vars(arguments).items() if name != "output"}
    return {
        "arguments": given,
        "processor": processor_name(),
        "instruction_set": instruction_sets()["chosen"],
        "versions": versions(),
        "date": time.strftime("%Y-%m-%d"),
    }


def write(output: Path, name: str, result: dict[str, Any], draw: Callable[[Any], None], panels: int = 1) -> None:
    """Write name.json, and name.png as `draw` fills its axes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    output.mkdir(parents=True, exist_ok=True)
    (output / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    figure, axes = pyplot.subplots(1, panels, figsize=(6 * panels, 4), layout="constrained")
    draw(axes)
    figure.savefig(output / f"{name}.png", dpi=120)
    pyplot.close(figure)
    finish_line(f"wrote {output / name}.json and .png")


def run(main: Callable[[], None]) -> None:
    """Run an example; Ctrl-C ends it with one line."""
    try:
        main()
    except KeyboardInterrupt:
        finish_line("interrupted: nothing was written, run it again from the start")
        sys.exit(130)
