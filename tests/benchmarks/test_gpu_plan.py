"""The plan of a GPU check: its parts and steps, their limits, and what they are told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from gpu import cases, plan

ROOT = Path(__file__).parents[2]
DESCRIBED = {"installed": ["pytest", "xdist"], "processors": 4}


def test_tuning_and_benchmarks_share_the_file_of_tiles() -> None:
    tuning, measuring = plan.tune_steps("python3", ROOT), plan.bench_steps("python3", ROOT, {})
    files = {step.environment["SIGHTLINE_TUNING"] for step in (*tuning, *measuring)}
    assert files == {str(plan.tiles_file(ROOT))}
    assert all(step.environment["SIGHTLINE_AUTOTUNE"] == "1" for step in tuning)
    assert not any("SIGHTLINE_AUTOTUNE" in step.environment for step in measuring)


def test_the_parts_together_take_less_than_ten_minutes() -> None:
    assert sum(plan.PARTS.values()) <= plan.WHOLE_LIMIT < 600


def test_a_part_that_is_run_by_name_has_the_time_of_all(tmp_path: Path) -> None:
    for part in plan.PARTS:
        assert plan.part_limit(part, alone=True) == plan.ALONE_LIMIT > plan.part_limit(part, alone=False)
    assert plan.ALONE_LIMIT <= plan.WHOLE_LIMIT
    limits = [
        {step.name: step.limit for step in plan.test_steps("python3", tmp_path, DESCRIBED, {}, limit)}
        for limit in (200.0, 580.0)
    ]
    assert limits[1] == {name: pytest.approx(2.9 * limit) for name, limit in limits[0].items()}
    # One test must fit into any step, or no call would ever get past it.
    assert min(limits[1].values()) > plan._TEST_LIMIT


def test_the_guide_says_how_long_all_steps_may_take() -> None:
    guide = " ".join((ROOT / "CONTRIBUTING.md").read_text().split())
    seconds = {
        "benchmarks": sum(step.limit for step in plan.bench_steps("python3", ROOT, {})),
        "tuning": sum(step.limit for step in plan.tune_steps("python3", ROOT)),
        "compute-sanitizer": sum(step.limit for step in plan.sanitize_steps("python3", ROOT)),
    }
    for name, limit in seconds.items():
        assert f"{limit:.0f} s of {name}" in guide
    for part, limit in plan.PARTS.items():
        assert f"{part} {limit:.0f} s" in guide


def test_without_pytest_the_tests_are_skipped_and_it_is_said(tmp_path: Path) -> None:
    steps = plan.test_steps("python3", tmp_path, {**DESCRIBED, "installed": []}, {}, 100.0)
    assert steps
    assert all("pytest is not installed" in step.unavailable for step in steps)


def test_every_test_file_of_the_plan_exists_and_is_marked_for_gpus() -> None:
    for files, _ in plan._TESTS.values():
        for name in files:
            path = ROOT / name
            sources = path.glob("test_*.py") if path.is_dir() else [path]
            texts = [source.read_text() for source in sources]
            assert texts
            # tests/triton/kernels gets its marks from its conftest.
            assert path.is_dir() or all("mark.gpu" in text for text in texts)


def test_the_fingerprint_of_a_part_follows_its_code(tmp_path: Path) -> None:
    def marks() -> dict[str, str]:
        return plan.fingerprints(tmp_path)

    def changed(name: str) -> set[str]:
        before = marks()
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(str(before))
        assert marks() == marks()
        return {part for part, mark in marks().items() if mark != before[part]}

    assert changed("python/sightline/kernel.py") == set(plan.KINDS)
    assert changed("tests/triton/test_it.py") == {"tests"}
    assert changed("benchmarks/gpu/cases.py") == set(plan.KINDS) - {"tests"}
    assert changed("docs/it.py") == set()


def test_children_find_what_the_caller_names_behind_this_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/somewhere/else")
    folders = plan.environment(ROOT)["PYTHONPATH"].split(":")
    assert folders == [*(str(ROOT / name) for name in ("python", "benchmarks", "tests")), "/somewhere/else"]


def test_tiles_of_an_earlier_machine_are_given_to_the_next(tmp_path: Path) -> None:
    tile = {"tile": [64, 32, 4, 2, True, False], "text": "64 x 32", "kernels": "k", "target": "t"}
    plan.restore_tiles(tmp_path, {})
    assert not plan.tiles_file(tmp_path).exists()
    plan.restore_tiles(tmp_path, {"tiles": {"a kind": tile}})
    expected = {"kernels": "k", "target": "t", "tiles": {"a kind": tile["tile"]}}
    assert json.loads(plan.tiles_file(tmp_path).read_text()) == expected
    plan.restore_tiles(tmp_path, {"tiles": {"another": tile}})
    assert json.loads(plan.tiles_file(tmp_path).read_text()) == expected


def test_cases_are_distinct_and_children_find_their_group() -> None:
    groups = list(cases.groups())
    keys = [group.key(case) for group in groups for case in group.cases]
    assert len(set(keys)) == len(keys)
    assert all(cases.find_group(group.name) == group for group in groups)
    lengths = {case.length for group in groups for case in group.cases if case.direction == "forward"}
    assert {1024, 4096, 65536, 131072} <= lengths
    with pytest.raises(ValueError, match="expected one of"):
        cases.find_group("forward")
