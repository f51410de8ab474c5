"""Steps in child processes: each under a time limit, their findings written down as they come, none repeated.

A child hands over findings as JSON lines through a pipe whose number stands in RECORDS_VARIABLE; the parent writes the
document after each of them. So whatever is cut off, child or parent, what was found until then is kept.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

RECORDS_VARIABLE = "SIGHTLINE_RECORDS"
# What earlier children found, for those that leave it out: the document itself, and a file with a list of tests.
FOUND_VARIABLE = "SIGHTLINE_FOUND"
PASSED_VARIABLE = "SIGHTLINE_PASSED_TESTS"
_GRACE = 5.0  # seconds between asking a group of processes to end and ending it
_TAIL = 4000  # characters of a failed step's output that are kept
_LEAST = 5.0  # seconds under which starting a step makes no sense
SETTLED = ("passed", "skipped")


@dataclass(frozen=True)
class Step:
    """A command and the seconds it may take.

    `accepts` holds the exit codes that count as passed. `unavailable`: why the step cannot run here, None where it can;
    `unavailable_where`: words in the output of a failure by which it says so itself. `restarts`: how often a child that
    failed is started again, to go on behind what it found. `every_call`: run again even where it has passed before.
    """

    part: str
    name: str
    command: Sequence[str]
    limit: float
    environment: Mapping[str, str] = field(default_factory=dict)
    accepts: tuple[int, ...] = (0,)
    unavailable: str | None = None
    unavailable_where: str | None = None
    restarts: int = 0
    every_call: bool = False

    @property
    def key(self) -> str:
        return f"{self.part}/{self.name}"


@dataclass(frozen=True)
class Outcome:
    """How a step ended: "passed", "failed", "cut off" by its limit, "not reached" or "skipped"; why, or its output."""

    status: str
    seconds: float = 0.0
    detail: str = ""


def record(finding: dict[str, Any]) -> None:
    """In a child: hand a finding to the parent; without a parent, print it."""
    line = json.dumps(finding) + "\n"
    number = os.environ.get(RECORDS_VARIABLE)
    if number is None:
        print(line, end="", flush=True)
    else:
        os.write(int(number), line.encode())


def found_before() -> dict[str, Any]:
    """In a child: the findings so far, by kind and name; empty without a parent."""
    path = os.environ.get(FOUND_VARIABLE)
    if path is None or not Path(path).exists():
        return {}
    findings: dict[str, Any] = json.loads(Path(path).read_text())["findings"]
    return findings


def run_step(step: Step, limit: float, keep: Callable[[dict[str, Any]], None], folder: Path) -> Outcome:
    """Run one step for at most `limit` seconds; every finding goes to `keep` as it arrives."""
    if step.unavailable is not None:
        return Outcome("skipped", 0.0, step.unavailable)
    reading, writing = os.pipe()
    start = time.monotonic()
    with tempfile.TemporaryFile() as output, os.fdopen(reading, "rb") as records:
        try:
            process = subprocess.Popen(
                step.command,
                cwd=folder,
                env={**os.environ, **step.environment, RECORDS_VARIABLE: str(writing)},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=(writing,),
                start_new_session=True,
            )
        except OSError as error:
            return Outcome("failed", 0.0, f"{step.command[0]}: {error.strerror}")
        finally:
            os.close(writing)
        reader = threading.Thread(target=_pass_on, args=(records, keep), daemon=True)
        reader.start()
        in_time = True
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            in_time = False
        finally:
            _end_group(process)
            reader.join(_GRACE)
        seconds = time.monotonic() - start
        output.seek(0)
        said = output.read().decode(errors="replace")
    tail = said[-_TAIL:]
    if not in_time:
        return Outcome("cut off", seconds, f"after {limit:.0f} s\n{tail}")
    if process.returncode in step.accepts:
        return Outcome("passed", seconds)
    if step.unavailable_where is not None and step.unavailable_where in said:
        return Outcome("skipped", seconds, step.unavailable_where)
    return Outcome("failed", seconds, f"exit code {process.returncode}\n{tail}")


def _pass_on(records: BinaryIO, keep: Callable[[dict[str, Any]], None]) -> None:
    for line in records:
        if line.endswith(b"\n"):  # the last one may have been cut in two
            keep(json.loads(line))


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """End the child and everything it started, which shares its process group."""
    # A process that is stuck in the driver does not end even then; it must not hold up the others.
    for number, patience in ((signal.SIGTERM, _GRACE), (signal.SIGKILL, _GRACE)):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)


class Document:
    """The one JSON file of a check: read where an earlier call left it, written whole after every finding."""

    def __init__(self, path: Path, fresh: dict[str, Any]) -> None:
        self.path = path
        self.content = fresh

    def resume(self, kinds: Mapping[str, Sequence[str]]) -> bool:
        """Take over what an earlier call found with the same versions on the same kind of device; whether it did.

        Parts whose code has changed since begin again; `kinds`: the kinds of findings of each. What cannot be continued
        is set aside.
        """
        try:
            earlier = json.loads(self.path.read_text())
            same = all(earlier[name] == self.content[name] for name in ("schema", "versions"))
            same = same and earlier["device"]["name"] == self.content["device"]["name"]
            marks = dict(earlier["fingerprints"])
        except (OSError, ValueError, KeyError, TypeError):
            same = False
        if not same:
            with contextlib.suppress(OSError):
                self.path.replace(self.path.with_suffix(".earlier.json"))
            return False
        fingerprints = self.content["fingerprints"]
        self.content = {**earlier, "fingerprints": fingerprints}
        for part, mark in fingerprints.items():
            if marks.get(part) != mark:
                self.forget(part, *kinds[part])
        return True

    def write(self) -> None:
        """Replace the file in one move, so that no reader ever sees half of it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.content, indent=1) + "\n")
        partial.replace(self.path)

    def keep(self, finding: dict[str, Any]) -> None:
        """Add a finding, {"kind": ..., "name": ..., ...}; one of the same kind and name replaces it."""
        finding = dict(finding)
        self.content["findings"].setdefault(finding.pop("kind"), {})[finding.pop("name")] = finding
        self.write()

    def settle(self, step: Step, outcome: Outcome) -> None:
        """Write down how a step ended."""
        self.content["steps"][step.key] = asdict(outcome)
        self.write()

    def forget(self, part: str, *kinds: str) -> None:
        """Drop the findings of a part, which no longer hold."""
        steps = self.content["steps"]
        self.content["steps"] = {key: step for key, step in steps.items() if not key.startswith(f"{part}/")}
        for kind in kinds:
            self.content["findings"].pop(kind, None)
        self.write()

    def unfinished(self) -> list[str]:
        """The steps that a limit ended or kept from beginning."""
        steps = self.content["steps"]
        return [key for key, step in steps.items() if step["status"] in ("cut off", "not reached")]

    def is_settled(self, step: Step) -> bool:
        """Whether a step has passed already, or cannot run here."""
        return not step.every_call and self.content["steps"].get(step.key, {}).get("status") in SETTLED


def run_part(
    steps: Sequence[Step],
    limit: float,
    document: Document,
    folder: Path,
    say: Callable[[str], None],
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Run the steps of one part that are not settled yet, in order, for at most `limit` seconds in all."""
    end = clock() + limit
    for step in steps:
        if document.is_settled(step):
            say(f"{step.key}: done before")
            continue
        told = replace(step, environment={**step.environment, FOUND_VARIABLE: str(document.path.absolute())})
        for attempt in range(1 + step.restarts):
            left = end - clock()
            if left < _LEAST and step.unavailable is None:
                if attempt == 0:
                    document.settle(step, Outcome("not reached", 0.0, "the time of its part was up"))
                    say(f"{step.key}: not reached")
                break
            outcome = run_step(told, min(step.limit, left), document.keep, folder)
            document.settle(step, outcome)
            first_line = outcome.detail.partition("\n")[0]
            say(f"{step.key}: {outcome.status}, {outcome.seconds:.0f} s" + (f" ({first_line})" if first_line else ""))
            if outcome.status != "failed":
                break
