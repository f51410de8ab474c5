"""recurrence_ratio.py: what is measured beside the recurrence, what is left out and why, and how the page shows it."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import recurrence_peers
import recurrence_ratio
import render
import torch

ARGUMENTS = ["--lengths", "40", "--heads", "2", "--width", "8", "--repetitions", "1", "--dtypes", "float32"]
ARGUMENTS += ["--long-lengths", "48,64", "--sdpa-once", "64", "--decoding-batches", "1,3", "--peak-length", "0"]
ARGUMENTS += ["--one-head-length", "40", "--decoding-layers", "4"]


@pytest.fixture(scope="module")
def results() -> list[dict]:
    options = recurrence_ratio.arguments(ARGUMENTS)
    sweeps = [row for sweep in range(2) for row in recurrence_ratio.measure(options, "float32", sweep)]
    return recurrence_ratio.pooled(sweeps)


def rows(results: list[dict], measurement: str) -> list[tuple]:
    return [
        (result["batch"], result["length"], result["implementation"])
        for result in results
        if result["measurement"] == measurement
    ]


def test_every_measurement_puts_its_peers_beside_the_recurrence(results: list[dict]) -> None:
    assert rows(results, "causal") == [(1, 40, name) for name in ("recurrence", "formula", "sdpa")]
    assert rows(results, "unordered") == [(1, 40, "recurrence"), (1, 40, "products")]
    for measurement in ("backward", "unordered backward"):
        assert rows(results, measurement) == [(1, 40, "forward"), (1, 40, "backward")]
    for measurement in ("causal", "causal backward", "unordered", "unordered backward"):
        measured = [result for result in results if result["measurement"] == f"one head, {measurement}"]
        assert [result["implementation"] for result in measured] == ["two threads", "one thread"]
        assert {result["heads"] for result in measured} == {1}
    names = ("recurrence", "memory", "recurrence call", "memory call")
    assert rows(results, "decoding") == [(batch, 1, name) for batch in (1, 3) for name in names]
    assert rows(results, "decoding in layers") == [(batch, 1, name) for batch in (1, 3) for name in names[:2]]
    assert {result.get("layers") for result in results if result["measurement"] == "decoding in layers"} == {4}
    for result in results:
        own = next(
            other
            for other in results
            if all(other[name] == result[name] for name in ("measurement", "batch", "length"))
        )
        assert result["ratio"] == pytest.approx(result["seconds"]["median"] / own["seconds"]["median"])


def test_sdpa_runs_once_at_one_long_length(results: list[dict]) -> None:
    assert rows(results, "length") == [(1, 48, "recurrence"), (1, 64, "recurrence"), (1, 64, "sdpa")]
    assert results[-1]["repetitions"] == 1
    assert {result["repetitions"] for result in results if result["measurement"] == "causal"} == {2}


def test_short_contexts_are_repeated_until_a_run_has_as_many_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []
    monkeypatch.setitem(recurrence_ratio.CAUSAL, "recurrence", lambda query, *rest: lengths.append(query.shape[2]))
    monkeypatch.setattr(recurrence_ratio, "RUN_TOKENS", 48)
    options = recurrence_ratio.arguments([*ARGUMENTS, "--repetitions", "2", "--long-lengths", "16,48,64"])
    shape = {"dtype": "float32", "batch": 1, "heads": 2, "width": 8}
    found = recurrence_ratio.measure_lengths(options, shape, sweep=1)
    assert [(row["length"], len(row["samples"])) for row in found] == [(16, 2), (48, 2), (64, 2)]
    rounds = [lengths[start : start + 5] for start in range(0, len(lengths), 5)]
    assert len(rounds) == 3  # one warms up
    assert all(sorted(calls) == [16, 16, 16, 48, 64] for calls in rounds)


def test_sweeps_are_pooled_case_by_case() -> None:
    def row(name: str, seconds: list[float], length: int = 40) -> dict:
        return recurrence_ratio.row_of("causal", {"length": length}, name, seconds)

    left_out = {"measurement": "causal", "length": 80, "implementation": "a", "error": "needs memory"}
    first = [row("a", [1.0, 9.0]), row("b", [2.0, 6.0]), row("a", [5.0], 60), left_out, left_out | {"length": 90}]
    second = [row("a", [2.0]), row("b", [6.0]), row("a", [7.0], 60), row("a", [3.0], 80), left_out | {"length": 90}]
    found = recurrence_ratio.pooled(first + second)
    keys = ("length", "implementation", "repetitions", "ratio", "error")
    assert [tuple(result.get(key) for key in keys) for result in found] == [
        (40, "a", 3, 1.0, None),
        (40, "b", 3, 3.0, None),
        (60, "a", 2, 1.0, None),
        (80, "a", 1, 1.0, None),
        (90, "a", None, None, "needs memory"),
    ]
    assert [result["seconds"]["median"] for result in found[:4]] == [2.0, 6.0, 6.0, 3.0]


def test_rates_of_the_machine_are_measured_where_there_is_a_development_build(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise FileNotFoundError("not built")

    monkeypatch.setattr(recurrence_ratio, "bench_module", missing)
    assert recurrence_ratio.machine_rates(2) is None
    monkeypatch.setattr(recurrence_ratio, "READ_BYTES", 64)
    monkeypatch.setattr(recurrence_ratio, "bench_module", lambda: "bench")
    monkeypatch.setattr(recurrence_ratio, "multiply_rates", lambda bench, isa, threads: {bench: 10.0 * threads})
    monkeypatch.setattr(recurrence_ratio, "read_rate", lambda bench, isa, memory, threads: memory.nbytes * threads)
    assert recurrence_ratio.machine_rates(2) == {"multiply_gflops": {"bench": 20.0}, "read_gigabytes_per_second": 128}


def test_a_call_on_some_threads_has_them_and_gives_them_back() -> None:
    before = torch.get_num_threads()
    for threads in (1, 2):
        assert recurrence_ratio.on_threads(threads, torch.get_num_threads) == threads
    assert torch.get_num_threads() == before


def test_defaults_reach_a_million_tokens() -> None:
    options = recurrence_ratio.arguments([])
    assert options.long_lengths[-1] == options.peak_length == 1048576
    assert options.sdpa_once in options.long_lengths
    assert options.decoding_batches == [1, 16]


@pytest.mark.parametrize(("dtype", "gigabytes"), [("float32", 16), ("bfloat16", 10)])
def test_what_does_not_fit_into_memory_is_left_out_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, dtype: str, gigabytes: int
) -> None:
    options = recurrence_ratio.arguments(["--long-lengths", "1048576", "--dtypes", dtype])
    available = int(gigabytes * 2**30 / recurrence_ratio.MEMORY_SHARE) + 2**20
    case = {"dtype": dtype, "heads": 8, "length": 1048576, "width": 128}
    monkeypatch.setattr(recurrence_ratio, "available_memory", lambda device: available)
    assert recurrence_ratio.want_of_memory(case) is None
    monkeypatch.setattr(recurrence_ratio, "available_memory", lambda device: None)
    assert recurrence_ratio.want_of_memory(case) is None
    monkeypatch.setattr(recurrence_ratio, "available_memory", lambda device: 8 * 2**30)
    (found,) = recurrence_ratio.measure_lengths(options, case)
    assert found["length"] == 1048576
    assert found["error"] == f"needs {gigabytes}.0 GiB of memory, 8.0 GiB are available"
    assert recurrence_ratio.measure_memory(options, dtype)["error"] == found["error"]


@pytest.mark.parametrize(("room", "outputs"), [(7.0, 6), (6.0, 5), (2.2, 2), (2.0, 0), (None, 0)])
def test_memory_of_outputs_is_kept_for_every_pass_and_one_more_or_for_two(
    monkeypatch: pytest.MonkeyPatch, room: float | None, outputs: int
) -> None:
    output_bytes = 2 * 48 * 8 * 4
    kept: list[bool] = []
    available = None if room is None else int(room * output_bytes)
    monkeypatch.setattr(recurrence_ratio, "available_memory", lambda device: available)
    monkeypatch.setattr(recurrence_ratio, "want_of_memory", lambda case: None)
    monkeypatch.setattr(recurrence_ratio, "keep_freed_memory", lambda keeps=True: kept.append(keeps))
    assert recurrence_ratio.outputs_to_keep(output_bytes, 5) == outputs
    shape = {"dtype": "float32", "batch": 1, "heads": 2, "width": 8}
    options = recurrence_ratio.arguments([*ARGUMENTS, "--repetitions", "5", "--long-lengths", "48,30"])
    found = recurrence_ratio.measure_lengths(options, shape)
    assert [row["length"] for row in found] == [30, 48]
    assert all(len(row["samples"]) == 5 and min(row["samples"]) > 0 for row in found)
    assert kept == ([] if outputs else [False, True])


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc alone has mallopt")
def test_freed_memory_is_kept_however_large_it_is() -> None:
    # In a process of its own: what the allocator of this one keeps depends on the tests before. Nothing is written into
    # the memory, so that it takes none.
    program = """
import ctypes, torch, recurrence_ratio
sbrk = ctypes.CDLL(None).sbrk
sbrk.restype, sbrk.argtypes = ctypes.c_void_p, [ctypes.c_ssize_t]
for keeps in (True, False):
    recurrence_ratio.keep_freed_memory(keeps)
    before = sbrk(0)
    torch.empty(2**31 + 2**20, dtype=torch.uint8)
    print(sbrk(0) - before >= 2**31)
    recurrence_ratio.return_freed_memory()
"""
    folder = str(Path(recurrence_ratio.__file__).parent)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([folder, os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["True", "False"], done.stderr


def test_decoding_steps_do_what_they_are_named_for() -> None:
    steps = recurrence_peers.decoding_steps(3, 2, 8, torch.float32)
    output, state = steps["recurrence"]()
    assert output.shape == (3, 2, 1, 8)
    assert state.memory.shape == steps["memory"]().shape == (3, 2, 8, 8)
    output, state = steps["recurrence call"]()
    assert output.shape == state.memory.shape == steps["memory call"]().shape == (1, 1, 1, 1)


def test_every_layer_of_a_decoding_step_goes_on_from_its_own_state() -> None:
    torch.manual_seed(0)
    steps = recurrence_peers.layered_decoding_steps(3, 2, 4, 8, torch.float32)
    first, later = steps["memory"](), steps["memory"]()
    assert len(first) == 3
    assert all(torch.equal(new, old + 1) for new, old in zip(later, first, strict=True))
    first, later = steps["recurrence"](), steps["recurrence"]()
    assert [state.shape for state in first] == [(2, 4, 8, 8)] * 3
    # All layers see one token: each step brings their states closer to it, and none is another's.
    for one, other in ((0, 1), (1, 2)):
        before, after = ((states[one] - states[other]).norm() for states in (first, later))
        assert 0 < after < before


def test_backward_passes_are_those_of_their_order() -> None:
    inputs = recurrence_peers.random_inputs(2, 20, 8, torch.float32)
    for causal in (True, False):
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        function = (recurrence_peers.CAUSAL if causal else recurrence_peers.UNORDERED)["recurrence"]
        output = function(*leaves)
        gradient = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
        expected = torch.autograd.grad(output, leaves, gradient)
        found = recurrence_peers.backward_pass(inputs, causal)()
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_page_shows_every_result_and_what_was_left_out(results: list[dict]) -> None:
    left_out = {"measurement": "length", "dtype": "float32", "batch": 1, "heads": 2, "width": 8, "length": 4096}
    left_out |= {"implementation": "recurrence", "error": "needs 9.0 GiB of memory, 1.0 GiB are available"}
    memory = {"dtype": "float32", "heads": 2, "width": 8, "length": 4096}
    document = {
        "schema": recurrence_ratio.SCHEMA,
        "device": {"kind": "cpu", "name": "Test CPU", "threads": 1},
        "instruction_set": {"chosen": "generic"},
        "versions": {},
        "command": "recurrence_ratio.py",
        "machine_rates": [
            {"multiply_gflops": {"float32": 300.2, "bfloat16": 0.0}, "read_gigabytes_per_second": 23.0},
            {"multiply_gflops": {"float32": 279.0, "bfloat16": 0.0}, "read_gigabytes_per_second": 23.4},
        ],
        "timings": [*results, left_out],
        "memory": [memory | {"beyond_output_bytes": 3 * 2**20}, memory | {"error": left_out["error"]}],
    }
    text = render.render([document])
    assert "multiplied 279 - 300 GFLOP/s of float32 in registers and read 23 GB/s." in text
    del document["machine_rates"]
    assert "in registers and read" not in render.render([document])
    assert text.count("| float32, B = 1, H = 2, D = 8, N = 40 |") == 9
    assert "### Backward pass over the whole sequence" in text
    assert "### One head, causal backward pass, two threads against one" in text
    assert text.count("| float32, B = 1, H = 1, D = 8, N = 40 |") == 8
    assert "| float32, B = 3, H = 2, D = 8, N = 1 | reading and writing the state |" in text
    assert "N = 4,096 | sightline additive_recurrence | left out: needs 9.0 GiB of memory" in text
    assert "D = 8, N = 4,096: 3.0 MiB." in text
    assert "D = 8, N = 4,096: left out: needs 9.0 GiB" in text
    assert "(once) |" in text
