"""docs/performance.md says what the committed measurements say, and nothing else."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

RENDER = Path(__file__).parents[2] / "benchmarks" / "render.py"


@pytest.fixture
def page() -> ModuleType:
    specification = importlib.util.spec_from_file_location("performance_page", RENDER)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict:
    directory = tmp_path_factory.mktemp("measured")
    shape = (
        "--layers",
        "1",
        "--heads",
        "2",
        "--kv-heads",
        "1",
        "--head-dim",
        "16",
        "--threads",
        "1",
        "--device",
        "cpu",
    )
    limits = ("--memory-limit", "8MiB", "--repetitions", "1", "--lengths", "64,1024")
    command = [sys.executable, "-m", "sightline", "bench", *shape, *limits, "--output", str(directory)]
    subprocess.run(command, check=True, capture_output=True)
    return json.loads((directory / "bench.json").read_text())


def test_committed_page_is_up_to_date():
    result = subprocess.run([sys.executable, str(RENDER), "--check"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_make_bench_writes_every_committed_result_of_a_cpu_and_then_the_page():
    recipe = subprocess.run(
        ["make", "--dry-run", "bench"], cwd=RENDER.parents[1], capture_output=True, text=True, check=True
    ).stdout
    scripts = [Path(line.split()[-1]) for line in recipe.splitlines() if line.split()[-1].startswith("benchmarks/")]
    assert all((RENDER.parents[1] / script).exists() for script in scripts)
    assert scripts[-1].name == "render.py"
    documents = [json.loads(path.read_text()) for path in RENDER.parent.glob("results/*.json")]
    written = {document["command"].split()[0] for document in documents if document["device"]["kind"] == "cpu"}
    assert written <= {script.name for script in scripts}


def test_page_shows_every_row_of_a_bench_run_skipped_ones_with_their_reason(page, measured):
    text = page.render([measured])
    for found in measured["results"]:
        line = next(
            line for line in text.splitlines() if line.startswith(f"| {found['tokens']:,} | {found['label']} |")
        )
        if found["status"] == "measured":
            assert f"{found['tokens_per_second']['median']:,.0f} (" in line
            assert f"| {found['ratio_to_sdpa']:.2f} |" in line
        else:
            assert f"skipped: {found['reason']}" in line
    assert "skipped: memory" in text
    assert measured["command"] in text


def test_page_without_gpu_results_says_so_and_leaves_every_target_open(page, measured):
    text = page.render([measured])
    assert "Unmeasured" in text
    assert "CPU targets" not in text
    assert text.count(f"| {page.summary.UNMEASURED} |") == len(page.summary.TARGETS)


def test_page_shows_a_gpu_check(page, measured):
    results = {
        "sdpa-flash": {"seconds": {"median": 1e-3}, "tflops": 400.0},
        "softmax": {"seconds": {"median": 2e-3}, "tflops": 200.0},
        "sdpa-cudnn": {"error": "no kernel for this"},
    }
    case = {"label": "a case", "direction": "forward", "dtype": "bfloat16", "head_dim": 128, "length": 4096}
    checked = measured | {
        "schema": page.summary.SCHEMA,
        "device": measured["device"] | {"kind": "cuda", "name": "Test GPU"},
        "steps": {"bench/one": {"status": "passed"}, "sanitize/racecheck": {"status": "cut off"}},
        "findings": {
            "tests": {"a": {"outcome": "passed"}, "b": {"outcome": "failed"}},
            "peaks": {"bfloat16": {"tflops": 800.0}, "copy": {"gigabytes_per_second": 4000.0}},
            "skips": {"clustered keys": {"skipped_share": 0.625, "gain": 1.25, "seconds": {}}},
            "cases": {"one: a case": case | {"results": results}},
        },
    }
    text = page.render([checked])
    assert "Unmeasured" not in text
    assert "## GPU check on Test GPU" in text
    assert "| a case | softmax | 2 | 0.50 | 200 TFLOP/s | 25% |" in text
    assert "left out: no kernel for this" in text
    assert "0.50 (softmax, a case; 1 of 32 cases) |  |" in text
    assert "1 passed, 1 failed" in text
    assert "| clustered keys | 62% | 1.25 |" in text
    assert "sanitize/racecheck: cut off" in text


def test_unknown_schema_is_refused(page):
    with pytest.raises(ValueError, match="sightline-bench/1"):
        page.render([{"schema": "something else", "device": {"kind": "cpu"}}])
