"""Steps of a GPU check: limits hold, findings are kept as they come, and what was cut off goes on where it stopped."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
from gpu.steps import Document, Step, run_part, run_step

ROOT = Path(__file__).parents[2]
RECORD = "from gpu.steps import record; "
CHILD = {"PYTHONPATH": str(ROOT / "benchmarks")}
KINDS = {"part": ("things",)}


def step(code: str, *, name: str = "one", limit: float = 60.0, **options: object) -> Step:
    return Step("part", name, (sys.executable, "-c", RECORD + code), limit, CHILD, **options)


def finding(name: str, **fields: object) -> str:
    return f"record({ {'kind': 'things', 'name': name, **fields}!r}); "


@pytest.fixture
def document(tmp_path: Path) -> Document:
    identity = {"schema": "s", "fingerprints": {"part": "f"}, "device": {"name": "d"}, "versions": {}}
    return Document(tmp_path / "found.json", {**identity, "steps": {}, "findings": {}})


def stored(document: Document) -> dict:
    return json.loads(document.path.read_text())


def run(document: Document, *steps: Step, limit: float = 60.0) -> list[str]:
    said: list[str] = []
    run_part(steps, limit, document, ROOT, said.append)
    return said


def test_findings_and_outcomes_are_written(document: Document) -> None:
    run(document, step(finding("a", number=1) + finding("b", number=2)))
    assert stored(document)["findings"] == {"things": {"a": {"number": 1}, "b": {"number": 2}}}
    assert stored(document)["steps"]["part/one"]["status"] == "passed"


def test_a_finding_is_in_the_file_before_its_step_ends(document: Document) -> None:
    seen_by_child = f"import json, time, pathlib; path = pathlib.Path({str(document.path)!r})\n"
    wait = (
        "end = time.time() + 30\n"
        "while time.time() < end and not (path.exists() and 'early' in path.read_text()): time.sleep(0.01)\n"
        "assert 'early' in path.read_text()"
    )
    run(document, step(finding("early") + "\n" + seen_by_child + wait))
    assert stored(document)["steps"]["part/one"]["status"] == "passed"


def test_a_step_that_hangs_is_cut_off_with_its_children_and_keeps_its_findings(document: Document) -> None:
    code = (
        "import subprocess, sys, os, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "record({'kind': 'things', 'name': 'child', 'pid': child.pid})\n"
        "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "time.sleep(600)"
    )
    start = time.monotonic()
    run(document, step(code, limit=4.0))
    assert time.monotonic() - start < 60
    assert stored(document)["steps"]["part/one"]["status"] == "cut off"
    child = stored(document)["findings"]["things"]["child"]["pid"]
    end = time.monotonic() + 30
    while _is_running(child) and time.monotonic() < end:
        time.sleep(0.05)
    assert not _is_running(child)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


def test_a_failure_is_told_with_its_last_output_and_the_next_step_runs(document: Document) -> None:
    said = run(document, step("raise SystemExit('no such kernel')"), step(finding("b"), name="two"))
    steps = stored(document)["steps"]
    assert steps["part/one"]["status"] == "failed"
    assert "no such kernel" in steps["part/one"]["detail"]
    assert steps["part/two"]["status"] == "passed"
    assert said[0].startswith("part/one: failed")


def test_a_crash_of_the_child_is_a_failure(document: Document) -> None:
    run(document, step(finding("a") + f"import os; os.kill(os.getpid(), {int(signal.SIGSEGV)})"))
    assert stored(document)["steps"]["part/one"]["status"] == "failed"
    assert "a" in stored(document)["findings"]["things"]


def test_a_command_that_does_not_exist_is_a_failure(document: Document) -> None:
    run(document, Step("part", "one", ("/no/such/command",), 5.0))
    assert stored(document)["steps"]["part/one"]["status"] == "failed"


def test_accepted_exit_codes_pass_and_unavailable_steps_are_skipped(document: Document) -> None:
    said = run(
        document,
        step("raise SystemExit(5)", accepts=(0, 5)),
        step("raise SystemExit(1)", name="two", unavailable="there is no tool"),
        step("raise SystemExit('Device not supported')", name="three", unavailable_where="Device not supported"),
    )
    statuses = [entry["status"] for entry in stored(document)["steps"].values()]
    assert statuses == ["passed", "skipped", "skipped"]
    assert "there is no tool" in said[1]


def test_that_a_step_cannot_run_is_found_anywhere_in_its_output(document: Document) -> None:
    code = "print('Device not supported'); print('x' * 100000); raise SystemExit(1)"
    run(document, step(code, unavailable_where="Device not supported"), step("raise SystemExit(1)", name="two"))
    assert [entry["status"] for entry in stored(document)["steps"].values()] == ["skipped", "failed"]


def test_a_part_ends_with_its_time_and_says_what_it_did_not_reach(document: Document) -> None:
    times = iter([0.0, 1.0, 97.0])
    said: list[str] = []
    steps = [step(finding("a")), step(finding("b"), name="two")]
    run_part(steps, 100.0, document, ROOT, said.append, clock=lambda: next(times))
    statuses = {key: entry["status"] for key, entry in stored(document)["steps"].items()}
    assert statuses == {"part/one": "passed", "part/two": "not reached"}
    assert "b" not in stored(document)["findings"]["things"]


def test_a_later_call_goes_on_where_the_first_stopped(document: Document, tmp_path: Path) -> None:
    marks = tmp_path / "marks"
    once = f"open({str(marks)!r}, 'a').write('x'); "
    run(document, step(once + finding("a")), step("import time; time.sleep(600)", name="two", limit=1.0))
    later = Document(document.path, {**document.content, "steps": {}, "findings": {}})
    assert later.resume(KINDS)
    said = run(later, step(once + finding("a")), step(finding("b"), name="two"))
    assert marks.read_text() == "x"
    assert said[0] == "part/one: done before"
    assert set(stored(later)["findings"]["things"]) == {"a", "b"}
    assert stored(later)["steps"]["part/two"]["status"] == "passed"


@pytest.mark.parametrize(
    ("changed", "value"), [("device", {"name": "e"}), ("versions", {"torch": "3"}), ("schema", "t")]
)
def test_findings_of_another_machine_are_set_aside(document: Document, changed: str, value: object) -> None:
    run(document, step(finding("a")))
    before = document.path.read_text()
    later = Document(document.path, {**document.content, changed: value, "steps": {}, "findings": {}})
    assert not later.resume(KINDS)
    assert later.content["findings"] == {}
    assert document.path.with_suffix(".earlier.json").read_text() == before


def test_parts_whose_code_has_changed_begin_again_and_others_go_on(document: Document) -> None:
    run(document, step(finding("a")))
    document.content["fingerprints"]["others"] = "g"
    document.keep({"kind": "others", "name": "b"})
    device = {"name": "d", "threads": 3}
    fingerprints = {"part": "changed", "others": "g"}
    fresh = {**document.content, "fingerprints": fingerprints, "device": device, "steps": {}, "findings": {}}
    later = Document(document.path, fresh)
    assert later.resume({**KINDS, "others": ("others",)})
    assert later.content["findings"] == {"others": {"b": {}}}
    assert later.content["steps"] == {}
    assert later.content["fingerprints"] == fingerprints


def test_a_file_cut_in_two_is_not_continued(document: Document) -> None:
    document.path.write_text('{"schema": "s", "fing')
    assert not document.resume(KINDS)


def test_a_child_that_failed_is_started_again_and_knows_what_it_found(document: Document) -> None:
    code = (
        "from gpu.steps import found_before\n"
        "number = len(found_before().get('things', {}))\n"
        "record({'kind': 'things', 'name': str(number)})\n"
        "raise SystemExit(3 * (number < 2))"
    )
    said = run(document, step("\n" + code, restarts=5))
    assert [line.partition(",")[0] for line in said] == ["part/one: failed"] * 2 + ["part/one: passed"]
    assert set(stored(document)["findings"]["things"]) == {"0", "1", "2"}
    assert len(run(document, step("raise SystemExit(1)", name="two", restarts=1))) == 2
    assert stored(document)["steps"]["part/two"]["status"] == "failed"


def test_what_belongs_to_the_machine_runs_in_every_call(document: Document, tmp_path: Path) -> None:
    marks = tmp_path / "marks"
    for _ in range(2):
        run(document, step(f"open({str(marks)!r}, 'a').write('x')", every_call=True))
    assert marks.read_text() == "xx"


def test_half_a_line_is_not_taken_for_a_finding(document: Document) -> None:
    code = "import os; os.write(int(os.environ['SIGHTLINE_RECORDS']), b'{\"kind\": \"things\"')"
    kept: list[dict] = []
    outcome = run_step(step(code), 60.0, kept.append, ROOT)
    assert outcome.status == "passed"
    assert kept == []


def test_findings_that_no_longer_hold_are_forgotten_with_their_steps(document: Document) -> None:
    run(document, step(finding("a")))
    document.keep({"kind": "others", "name": "b"})
    document.forget("part", "things")
    assert stored(document)["findings"] == {"others": {"b": {}}}
    assert stored(document)["steps"] == {}
