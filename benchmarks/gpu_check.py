"""`make gpu-check`: on a machine with a GPU, the tests that need one, compute-sanitizer, and the GPU benchmarks.

    python benchmarks/gpu_check.py --part bench --results benchmarks/results

A call ends within ten minutes, with what the machine has: its own torch, Triton and pytest, no network. Every step is a
child process with a limit, and what it finds is in the JSON file at once, so what one call did not reach the next one
does. Where there is no GPU it says so in one line and exits with 0.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpu import plan, summary
from gpu.steps import Document, Step, run_part, run_step
from gpu.watch import given_up

ROOT = Path(__file__).resolve().parent.parent


def say(line: str) -> None:
    """One line of progress."""
    print(line, flush=True)


def describe(python: str) -> dict[str, Any]:
    """What the machine is, asked in a child process; {"absent": why} where there is nothing to measure."""
    command = [python, "-m", "gpu.describe"]
    told = {**os.environ, **plan.environment(ROOT)}
    for last in (False, True):  # the first import on a new machine reads gigabytes
        try:
            found = subprocess.run(
                command, env=told, capture_output=True, text=True, timeout=plan.DESCRIBE_LIMIT, check=False
            )
            break
        except subprocess.TimeoutExpired:
            if last:
                return {"failed": f"asking twice for a GPU took more than {plan.DESCRIBE_LIMIT:.0f} s each"}
    if found.returncode != 0:
        return {"failed": found.stderr[-2000:]}
    described: dict[str, Any] = json.loads(found.stdout.splitlines()[-1])
    return described


def build_missing(python: str, described: dict[str, Any], limit: float) -> dict[str, Any]:
    """Build the native libraries where they are missing or do not load here; the description afterwards.

    The one with the CUDA kernels is built where there is an nvcc.
    """
    wanted = ["native"] + ["cuda"] * (plan.find_nvcc() is not None)
    missing = [name for name in wanted if not described["libraries"][name]["loaded"]]
    if not missing:
        return described
    say(f"building: {described['libraries'][missing[0]]['reason']}")
    outcome = run_step(plan.build_step(python, ROOT), min(plan.BUILD_LIMIT, limit), lambda finding: None, ROOT)
    say(f"building: {outcome.status}, {outcome.seconds:.0f} s {outcome.detail[-1500:]}")
    return describe(python)


def steps_of(part: str, python: str, described: dict[str, Any], findings: dict[str, Any], limit: float) -> list[Step]:
    """The steps of a part that has so many seconds."""
    if part == "tests":
        return plan.test_steps(python, ROOT, described, findings, limit)
    if part == "tune":
        return plan.tune_steps(python, ROOT)
    if part == "sanitize":
        return plan.sanitize_steps(python, ROOT)
    return plan.bench_steps(python, ROOT, findings)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = [*plan.PARTS, "tune"]
    parser.add_argument("--part", choices=parts, help="one part alone; by default all but tune, which takes as long")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the JSON file")
    parser.add_argument("--limit", type=float, help="seconds for each part, instead of its own limit")
    parser.add_argument("--fresh", action="store_true", help="start again instead of continuing the JSON file")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is not done yet; 1 where a step failed, else 0."""
    options = arguments(argv)
    end = time.monotonic() + plan.WHOLE_LIMIT
    python = sys.executable
    described = describe(python)
    if "absent" in described:
        print(f"gpu-check: nothing to check, {described['absent']}")
        return 0
    if "failed" not in described:
        described = build_missing(python, described, end - time.monotonic())
    if "failed" in described:
        print(f"gpu-check: sightline does not import here:\n{described['failed']}", file=sys.stderr)
        return 1
    device = described["device"]
    slug = re.sub(r"[^a-z0-9]+", "_", device["name"].lower()).strip("_")
    fresh = {
        "schema": summary.SCHEMA,
        "command": "make gpu-check",
        "device": device,
        "versions": described["versions"],
        "fingerprints": plan.fingerprints(ROOT),
        "instruction_set": None,
        "backends": described["backends"],
        "steps": {},
        "findings": {},
    }
    document = Document(options.results / f"gpu_{slug}.json", fresh)
    if not options.fresh and document.resume(plan.KINDS):
        say(f"continuing {document.path}")
    for part in [options.part] if options.part else list(plan.PARTS):
        limit = options.limit if options.limit is not None else plan.part_limit(part, options.part is not None)
        limit = min(limit, end - time.monotonic())
        run_part(steps_of(part, python, described, document.content["findings"], limit), limit, document, ROOT, say)
        if part == "tune":
            document.forget("bench", "cases", "skips", "running", "lost")
    print(summary.text_table(document.content))
    print(f"written: {document.path}")
    if unfinished := document.unfinished():
        print(f"not finished: {len(unfinished)} of the steps; the same call again goes on with them")
    failed = any(step["status"] == "failed" for step in document.content["steps"].values())
    return int(failed or bool(given_up(document.content["findings"])))


if __name__ == "__main__":
    sys.exit(main())
