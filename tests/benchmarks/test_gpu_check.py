"""`make gpu-check` without a GPU, its pytest plugin, and its tables."""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import required
import torch
from gpu import cases, describe, plan, summary
from gpu.steps import Document, Outcome, Step, run_part

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu_check.py"
DESCRIBED = {
    "device": {"kind": "cuda", "name": "Test GPU 1", "threads": 4},
    "versions": {"torch": "2.11.0"},
    "processors": 4,
    "installed": ["pytest", "xdist"],
    "libraries": {name: {"loaded": True, "reason": "loaded"} for name in ("native", "cuda")},
    "backends": {},
}


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module, on a machine that seems to have a GPU and whose steps are two."""
    specification = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    monkeypatch.setattr(module, "describe", lambda python: copy.deepcopy(DESCRIBED))
    return module


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so_in_one_line_and_exits_with_0(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--results", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0
    assert result.stdout.count("\n") == 1
    assert "nothing to check, torch" in result.stdout
    assert result.stderr == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_make_gpu_check_takes_the_interpreter_it_is_given() -> None:
    make = shutil.which("make")
    if make is None:
        required.missing("there is no make")
    command = [make, "-s", "gpu-check", f"PYTHON={sys.executable}", "PART=bench"]
    # What `make test ARGS=...` was given is not for this make.
    environment = {
        name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKEOVERRIDES", "ARGS")
    }
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert "nothing to check" in result.stdout


def test_a_check_runs_its_parts_writes_one_file_and_ends_with_the_table(
    check: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def steps_of(part: str, *others: Any) -> list[Step]:
        kind, name = ("tests", "one") if part == "tests" else ("peaks", part)
        found = {"kind": kind, "name": name, "outcome": "passed", "gigabytes_per_second": 4000.0}
        return [
            Step(part, "only", (sys.executable, "-c", f"from gpu.steps import record; record({found!r})"), 60.0, told)
        ]

    told = plan.environment(ROOT)
    monkeypatch.setattr(check, "steps_of", steps_of)
    assert check.main(["--results", str(tmp_path)]) == 0
    (path,) = tmp_path.iterdir()
    assert path.name == "gpu_test_gpu_1.json"
    document = json.loads(path.read_text())
    assert document["schema"] == summary.SCHEMA
    assert {step["status"] for step in document["steps"].values()} == {"passed"}
    assert len(document["steps"]) == len(plan.PARTS)
    printed = capsys.readouterr().out
    assert "tests: 1 passed, 0 failed, 0 skipped" in printed
    assert printed.count(summary.UNMEASURED) == len(summary.TARGETS)
    assert check.main(["--results", str(tmp_path), "--part", "bench"]) == 0
    again = capsys.readouterr().out
    assert "bench/only: done before" in again
    assert "tests/only: done before" not in again


def test_after_tuning_the_benchmarks_are_measured_again(
    check: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(check.plan, "fingerprints", lambda root: dict.fromkeys(plan.KINDS, "same"))
    code = (
        "from gpu.steps import record; record({'kind': 'cases', 'name': 'a'}); record({'kind': 'tests', 'name': 'b'})"
    )
    told = plan.environment(ROOT)
    nothing = Step("tune", "only", (sys.executable, "-c", ""), 60.0)
    steps = {"bench": Step("bench", "only", (sys.executable, "-c", code), 60.0, told), "tune": nothing}
    monkeypatch.setattr(check, "steps_of", lambda part, *others: [steps[part]])
    monkeypatch.setattr(check.summary, "text_table", lambda document: "")
    for part, kinds in (("bench", {"cases", "tests"}), ("tune", {"tests"})):
        assert check.main(["--results", str(tmp_path), "--part", part]) == 0
        document = json.loads(next(tmp_path.iterdir()).read_text())
        assert set(document["findings"]) == kinds
    assert list(document["steps"]) == ["tune/only"]


def test_what_was_lost_makes_the_check_fail(
    check: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for times, code in ((1, 0), (2, 1)):
        finding = {"kind": "lost", "name": "a case, lssa", "times": times, "why": "w"}
        said = f"from gpu.steps import record; record({finding!r})"
        step = Step("bench", str(times), (sys.executable, "-c", said), 60.0, plan.environment(ROOT))
        monkeypatch.setattr(check, "steps_of", lambda *arguments, step=step: [step])
        assert check.main(["--results", str(tmp_path), "--part", "bench"]) == code
    assert "lost: a case, lssa (w)" in capsys.readouterr().out


def test_a_failed_step_makes_the_check_fail(
    check: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    failing = Step("bench", "only", (sys.executable, "-c", "raise SystemExit(3)"), 60.0)
    monkeypatch.setattr(check, "steps_of", lambda *arguments: [failing])
    assert check.main(["--results", str(tmp_path), "--part", "bench"]) == 1
    assert "bench/only: failed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("missing", "nvcc", "built"),
    [
        ((), "/nvcc", False),
        (("native",), None, True),
        (("cuda",), "/nvcc", True),
        (("cuda",), None, False),
        (("native", "cuda"), "/nvcc", True),
    ],
)
def test_libraries_that_are_missing_are_built_where_there_is_a_compiler_for_them(
    missing: tuple[str, ...], nvcc: str | None, built: bool, check: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    described = copy.deepcopy(DESCRIBED)
    for name in missing:
        described["libraries"][name] = {"loaded": False, "reason": f"{name} was not built"}
    ran: list[Step] = []

    def run_step(step: Step, *arguments: Any) -> Outcome:
        ran.append(step)
        return Outcome("passed", 1.0)

    monkeypatch.setattr(plan, "find_nvcc", lambda: nvcc)
    monkeypatch.setattr(check, "run_step", run_step)
    assert check.build_missing("python3", described, 100.0) == (DESCRIBED if built else described)
    assert len(ran) == built
    assert all(step.environment.get("CUDACXX") == nvcc for step in ran)


@pytest.mark.parametrize(
    ("cuda", "rocm", "available", "why"),
    [
        ("13.0", None, True, None),
        (None, "7.0", True, None),
        (None, None, False, "without CUDA or ROCm"),
        (None, "7.0", False, "finds no GPU"),
    ],
)
def test_a_gpu_is_one_of_nvidia_or_amd(
    cuda: str | None, rocm: str | None, available: bool, why: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.version, "hip", rocm)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    found = describe.absence()
    assert found is None if why is None else why in found


def test_the_machine_is_asked_for_both_libraries() -> None:
    libraries = describe.describe_libraries()
    assert libraries["native"] == {"loaded": True, "reason": "loaded"}
    assert libraries["cuda"]["loaded"] is torch.cuda.is_available()
    assert libraries["cuda"]["reason"]


def test_what_is_not_finished_is_said(
    check: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = [
        Step("bench", name, (sys.executable, "-c", code), 1.0)
        for name, code in (("one", ""), ("two", "import time; time.sleep(600)"))
    ]
    monkeypatch.setattr(check, "steps_of", lambda *arguments: steps)
    assert check.main(["--results", str(tmp_path), "--part", "bench"]) == 0
    assert "not finished: 1 of the steps" in capsys.readouterr().out


def test_a_machine_that_does_not_answer_is_a_failure(check: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(check.plan, "DESCRIBE_LIMIT", 0.01)
    assert "asking twice" in check.describe(sys.executable)["failed"]


PLUGIN_TESTS = """
import pytest
@pytest.mark.gpu
@pytest.mark.parametrize("number", [1, 2])
def test_passes(number): open(__file__ + f".ran{number}", "a").write("x")
@pytest.mark.gpu
def test_fails(): assert 1 == 2
@pytest.mark.gpu
def test_skips(): pytest.skip("no such unit")
def test_needs_no_gpu(): raise AssertionError
"""


@pytest.mark.parametrize("workers", [False, True], ids=["alone", "with workers"])
def test_outcomes_are_recorded_and_what_passed_is_not_run_again(
    tmp_path: Path, workers: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # This process may be a worker of xdist; those that it starts are not.
    for name in [name for name in os.environ if name.startswith("PYTEST_XDIST")]:
        monkeypatch.delenv(name)
    tests = tmp_path / "test_some.py"
    tests.write_text(PLUGIN_TESTS)
    document = Document(tmp_path / "found.json", {"steps": {}, "findings": {}})
    installed = ["pytest"] + ["xdist"] * workers

    def run() -> None:
        made = plan.test_steps(
            sys.executable, tmp_path, {**DESCRIBED, "installed": installed}, document.content["findings"], 100.0
        )
        files, _ = next(iter(plan._TESTS.values()))
        command = [
            part.replace("benchmarks/gpu", str(ROOT / "benchmarks/gpu")) for part in made[0].command[: -len(files)]
        ]
        told = {**made[0].environment, **plan.environment(ROOT)}
        step = Step("tests", "some", (*command, str(tests)), 90.0, told, made[0].accepts)
        run_part([step], 100.0, document, tmp_path, lambda line: None)

    monkeypatch.setenv("SIGHTLINE_TEST_SEED", "123")
    run()
    found = document.content["findings"]["tests"]
    outcomes = {name.rpartition("::")[2]: test["outcome"] for name, test in found.items()}
    expected = {"test_passes[1]": "passed", "test_passes[2]": "passed", "test_fails": "failed", "test_skips": "skipped"}
    assert outcomes == expected
    messages = {name.rpartition("::")[2]: test.get("message", "") for name, test in found.items()}
    assert "assert 1 == 2" in messages["test_fails"]
    assert "no such unit" in messages["test_skips"]
    seeds = {name.rpartition("::")[2]: test["seed"] for name, test in found.items() if "seed" in test}
    assert seeds == {"test_fails": "123"}
    table = summary.text_table({"device": {"name": "x"}, **document.content})
    assert "::test_fails (SIGHTLINE_TEST_SEED=123)" in table
    assert document.content["steps"]["tests/some"]["status"] == "failed"
    tests.write_text(PLUGIN_TESTS.replace("assert 1 == 2", "assert 1 == 1"))
    run()
    assert document.content["findings"]["tests"][next(name for name in found if "fails" in name)]["outcome"] == "passed"
    assert document.content["steps"]["tests/some"]["status"] == "passed"
    for number in (1, 2):
        assert Path(f"{tests}.ran{number}").read_text() == "x"


def measured(label: str, direction: str, results: dict[str, float], **changes: Any) -> dict[str, Any]:
    """A case with times in milliseconds, 0 for none, and rates of a thousand over them."""
    case = {"label": label, "direction": direction, "dtype": "bfloat16", "head_dim": 128, "length": 16384, **changes}
    rate = "gigabytes_per_second" if direction == "decode" else "tflops"
    return case | {
        "results": {
            name: {"seconds": {"median": time / 1e3}, rate: 1000 / time} if time else {"error": "no kernel"}
            for name, time in results.items()
        }
    }


def rows_of(findings: dict[str, Any]) -> dict[str, tuple[str, str]]:
    return {row[0]: (row[2], row[3]) for row in summary.target_rows(findings)}


def test_targets_take_the_worst_case_against_the_fastest_sdpa() -> None:
    times = {"sdpa-flash": 2.0, "sdpa-cudnn": 1.8, "sdpa-math": 0.0, "softmax": 2.0, "lssa": 2.1, "lssar": 3.0}
    good = measured("good", "forward", times)
    bad = measured("bad", "forward", {"sdpa-flash": 2.0, "softmax": 4.0, "lssa": 2.0}, head_dim=64)
    short = measured("short", "forward", {"sdpa-flash": 1.0, "softmax": 100.0}, length=1024)
    rows = rows_of({"cases": {"1": good, "2": bad, "3": short}})
    assert rows["Softmax and LSSA forward, x the fastest SDPA"] == ("0.50 (softmax, bad; 4 of 32 cases)", "")
    assert rows["LSSAR forward on random data, x LSSA"] == ("0.70 (lssar, good; 1 of 16 cases)", "")
    assert rows["Softmax forward, D = 128"] == ("500 TFLOP/s (good; 2 of 13 cases)", "")
    assert rows["LSSA backward, D = 128"] == (summary.UNMEASURED, "")
    without_bad = rows_of({"cases": {"1": good, "3": short}})
    assert without_bad["Softmax and LSSA forward, x the fastest SDPA"][0].startswith("0.86 (lssa, good;")


def every_case(slow: str = "", factor: float = 1.0) -> dict[str, Any]:
    """Findings of a check that measured all cases in a millisecond; `slow` took `factor` of them in the last one."""
    found = {}
    for group in cases.groups():
        for case in group.cases:
            results = dict.fromkeys(group.implementations, 1.0)
            found[group.key(case)] = asdict(case) | measured(
                case.name, case.direction, results, dtype=case.dtype, head_dim=case.head_dim, length=case.length
            )
    if slow:
        last = [case for case in found.values() if slow in case["results"] and case["dtype"] == "bfloat16"][-1]
        last["results"][slow]["seconds"]["median"] *= factor
    shares = {"recorded keys": {"skipped_share": 0.25}, "random keys": {"skipped_share": 0.5}}
    return {"cases": found, "peaks": {"copy": {"gigabytes_per_second": 1100.0}}, "skips": shares}


def test_a_verdict_waits_for_every_case() -> None:
    findings = every_case()
    text = "Softmax and LSSA backward, x the fastest SDPA, deterministic"
    rows = rows_of(findings)
    assert all("of" in found and found.endswith("cases)") for found, _ in rows.values())
    verdicts = {name: verdict for name, (_, verdict) in rows.items()}
    reported = verdicts.pop("LSSAR forward on recorded keys, share of tiles left out")
    assert reported == ""
    assert set(verdicts.values()) == {"yes", "no"}
    assert verdicts[text] == "yes"
    assert verdicts["Additive recurrence, forward and backward, x flash-linear-attention"] == "no"
    assert rows["LSSAR forward on recorded keys, share of tiles left out"][0].startswith("0.25")
    del findings["cases"][next(name for name in findings["cases"] if name.startswith("backward D=64"))]
    assert rows_of(findings)[text][1] == ""
    assert rows_of(every_case("lssa", 2.0))["LSSA backward, x FlexAttention"][1] == "no"


def test_decoding_is_compared_with_the_measured_copy() -> None:
    findings = {
        "peaks": {"copy": {"gigabytes_per_second": 4000.0}},
        "cases": {
            "1": measured("long", "decode", {"cuda-softmax": 0.25, "cuda-lssa": 0.28, "cuda-lssar": 0.5}, length=32768)
        },
    }
    rows = rows_of(findings)
    assert rows["CUDA decoding, share of copy bandwidth"] == ("0.89 (cuda-lssa, long; 2 of 6 cases)", "")
    assert rows["CUDA decoding of LSSAR, share of copy bandwidth"] == ("0.50 (cuda-lssar, long; 1 of 3 cases)", "")
