"""A GPU check goes on where an implementation took its process, or its device, with it; kernels are compiled ahead."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu import cases, compile_ahead, measure, peers, plan, summary, watch
from gpu.cases import Case

import sightline as sl

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
SMALL = Case("forward", "float32", 16, 48, True, 1, 2, 2)
GROUP = cases.Group("small", (SMALL,), ("lssa", "softmax"), 5.0)


def records(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_what_ran_when_a_process_ended_has_a_second_chance(capsys: pytest.CaptureFixture[str]) -> None:
    found: dict[str, Any] = {"running": {"small": {"case": "a", "implementation": "lssa"}}}
    for times in (1, 2):
        watching = watch.Watch("small", found)
        assert records(capsys) == [{"kind": "lost", "name": "a, lssa", "times": times, "why": "its process ended"}]
        found["lost"] = watching.lost
        assert watching.left_out("a", ("lssa", "softmax")) == (
            {"lssa": "lost: its process ended"} if times == 2 else {}
        )
    assert watch.Watch("small", {**found, "cases": {"a": {}}}).lost == found["lost"]
    assert watch.Watch("another", found).lost == found["lost"]
    assert records(capsys) == []


def test_what_had_a_second_chance_and_took_it_is_no_failure() -> None:
    found = {"lost": {"a, lssa": {"times": 1, "why": "w"}, "a, softmax": {"times": watch.CHANCES, "why": "v"}}}
    assert watch.given_up(found) == {"a, softmax": "v"}
    assert watch.given_up({}) == {}
    assert "lost: a, softmax (v)" in summary.text_table({"findings": found, "steps": {}, "device": {"name": "d"}})


def test_what_does_not_come_back_ends_its_process_and_is_named() -> None:
    code = "import time; from gpu.watch import Watch\nwith Watch('small', {}, 0.2).over('a', 'lssa'): time.sleep(60)"
    result = subprocess.run(
        [sys.executable, "-c", code], env=plan.environment(ROOT), capture_output=True, text=True, timeout=30
    )
    assert result.returncode == watch.EXIT_CODE
    lost, running = map(json.loads, result.stdout.splitlines())
    assert watch.Watch("small", {"running": {"small": running}}).lost == {}
    assert lost == {"kind": "lost", "name": "a, lssa", "times": 1, "why": "it did not come back in 0 s"}
    assert running["case"] is None


def test_what_comes_back_is_left_alone() -> None:
    code = (
        "import time; from gpu.watch import Watch\n"
        "with Watch('small', {}, 0.2).over('a', 'lssa'): pass\n"
        "time.sleep(0.6); print('alive')"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], env=plan.environment(ROOT), capture_output=True, text=True, timeout=30
    )
    assert (result.returncode, result.stdout) == (0, "alive\n")


def test_a_lost_device_ends_the_child_and_the_next_one_leaves_its_cause_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found: dict[str, dict[str, Any]] = {}
    monkeypatch.setattr(measure, "found_before", lambda: found)
    make = measure.make_call

    def broken(name: str, *arguments: Any) -> Any:
        if name == "lssa":
            raise RuntimeError("an illegal memory access")
        return make(name, *arguments)

    def timer(call: Any, calls: int, deterministic: bool) -> float:
        return 1e-3

    monkeypatch.setattr(measure, "make_call", broken)
    monkeypatch.setattr(measure, "is_lost", lambda device: True)
    monkeypatch.setattr(measure, "measure_case", partial(measure.measure_case, timer=timer))
    attention = partial(sl.attention, causal=True, backend="native")
    monkeypatch.setattr(peers, "make", lambda name, case: attention)
    with pytest.raises(SystemExit) as ended:
        measure.measure_group(GROUP, CPU)
    assert ended.value.code == watch.EXIT_CODE
    for finding in records(capsys):
        found.setdefault(finding.pop("kind"), {})[finding.pop("name")] = finding
    measure.measure_group(GROUP, CPU)
    again = records(capsys)
    assert {finding["kind"] for finding in again} == {"running", "cases"}
    (case,) = [finding for finding in again if finding["kind"] == "cases"]
    assert case["results"]["lssa"] == {"error": "lost: RuntimeError: an illegal memory access"}
    assert "seconds" in case["results"]["softmax"]


def test_every_kernel_is_compiled_ahead_by_one_process() -> None:
    planned = {
        (case, name)
        for group in cases.groups()
        for case in group.cases
        for name in group.implementations
        if not name.startswith(("sdpa", "eager"))
    }
    shares = compile_ahead.shares(14)
    assert sum(map(len, shares)) == len(planned)
    assert set().union(*shares) == planned
    owners: dict[object, set[int]] = {}
    for index, share in enumerate(shares):
        for case, name in share:
            owners.setdefault(compile_ahead.kernels_of(case, name), set()).add(index)
    assert all(len(found) == 1 for found in owners.values())
    assert max(map(len, shares)) < 2 * min(map(len, shares))


@pytest.mark.parametrize("direction", ["forward", "backward", "decode"])
def test_what_is_compiled_ahead_is_called_as_it_is_measured(
    direction: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gradients: list[bool] = []

    def attend(query: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        gradients.append(query.requires_grad)
        return sl.attention(query, *others, causal=True, backend="native")

    def make(name: str, case: Case) -> Any:
        if name == "absent":
            raise ModuleNotFoundError("no such package")
        return attend

    monkeypatch.setattr(peers, "make", make)
    case = Case(direction, "float32", 16, 48, True, 1, 2, 2)
    compile_ahead.work([(case, "absent"), (case, "softmax")], CPU)
    assert gradients == [direction == "backward"]
    missing, called = records(capsys)
    assert missing["error"] == "ModuleNotFoundError: no such package"
    assert (called["name"], called["error"]) == (f"{case.name}, softmax", None)
