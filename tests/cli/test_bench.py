"""`sightline bench`: what it writes, what it skips, what it refuses, and how it ends early."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from sightline.cli import bench, main
from sightline.cli.bench_settings import RequestedBench
from sightline.cli.corpus import Corpus

SMALL = ("--layers", "1", "--heads", "2", "--kv-heads", "1", "--head-dim", "16", "--threads", "1", "--device", "cpu")
ROWS = ["eager", "sdpa", "softmax", "lssa", "lssar"]


def load(directory: Path) -> dict:
    return json.loads((directory / "bench.json").read_text())


def test_small_run_measures_every_row_and_draws_it(sightline, tmp_path):
    result = sightline("bench", *SMALL, "--lengths", "96,32", "--repetitions", "3", "--output", "found/here")
    assert result.returncode == 0, result.stderr
    document = load(tmp_path / "found/here")
    assert document["schema"] == "sightline-bench/1"
    assert document["interrupted"] is False
    assert document["backend"] == "native"
    assert document["command"].startswith("sightline bench --layers 1")
    assert document["model"]["heads"] == 2
    assert document["model"]["kv_heads"] == 1
    assert document["device"]["kind"] == "cpu"
    assert document["device"]["threads"] == 1
    assert document["peak"]["gflops"] > 0
    assert {"sightline", "torch", "python"} <= set(document["versions"])
    assert document["instruction_set"]["chosen"] in document["instruction_set"]["available"]
    assert [(found["tokens"], found["row"]) for found in document["results"]] == [
        (tokens, row) for tokens in (32, 96) for row in ROWS
    ]
    for found in document["results"]:
        assert found["status"] == "measured"
        assert found["repetitions"] == 3
        assert found["seconds"]["p10"] <= found["seconds"]["median"] <= found["seconds"]["p90"]
        assert found["tokens_per_second"]["median"] == pytest.approx(found["tokens"] / found["seconds"]["median"])
        assert 0 < found["attention_seconds"]["median"] < found["seconds"]["p90"]
        pairs = found["tokens"] * (found["tokens"] + 1) / 2
        assert found["attention_gflops"] * found["attention_seconds"]["median"] == pytest.approx(
            4 * 2 * 16 * pairs / 1e9
        )
        assert found["peak_extra_bytes"] >= 0
        baseline = next(
            other for other in document["results"] if other["row"] == "sdpa" and other["tokens"] == found["tokens"]
        )
        assert found["ratio_to_sdpa"] == pytest.approx(baseline["seconds"]["median"] / found["seconds"]["median"])
    assert (tmp_path / "found/here/bench.png").read_bytes().startswith(b"\x89PNG")
    for words in ("32 tokens", "96 tokens", "torch SDPA", "sightline LSSAR", "x SDPA", "bench.json"):
        assert words in result.stdout


def test_decoding_is_measured_apart_from_prefill_and_drawn(sightline_here, tmp_path):
    arguments = ("--lengths", "48,96", "--repetitions", "3", "--decode", "3", "--feed-forward", "40")
    result = sightline_here("bench", *SMALL, *arguments)
    assert result.returncode == 0, result.stderr
    document = load(tmp_path / "sightline-bench")
    assert document["model"]["decode_steps"] == 3
    assert document["model"]["feed_forward"] == 40
    for found in document["results"]:
        assert found["status"] == "measured"
        rate, seconds = (found["decode"][name]["median"] for name in ("tokens_per_second", "seconds_per_token"))
        assert rate == pytest.approx(1 / seconds, rel=1e-3)  # medians of an odd number
        assert rate > 0
    assert "decode, tokens/s" in result.stdout
    assert (tmp_path / "sightline-bench/bench.png").read_bytes().startswith(b"\x89PNG")


def test_defaults_follow_the_device():
    request = RequestedBench({"device": "auto", "output": Path("x")})
    on_cpu, on_gpu = request.on("cpu"), request.on("cuda")
    assert (on_cpu.lengths[0], on_cpu.lengths[-1]) == (1024, 16384)
    assert (on_cpu.shape.feed_forward, on_cpu.decode_steps, on_cpu.dtype) == (0, 0, "float32")
    assert (on_gpu.lengths[0], on_gpu.lengths[-1]) == (4096, 2**20)
    assert on_gpu.shape.feed_forward > 0
    assert on_gpu.decode_steps > 0
    given = RequestedBench({"device": "auto", "output": Path("x"), "heads": 6, "kv_heads": 3, "lengths": (7,)})
    assert given.on("cuda").shape.heads == 6
    assert given.on("cuda").lengths == (7,)


def test_a_device_that_runs_out_of_memory_ends_its_row_and_not_the_run(monkeypatch):
    settings = RequestedBench(
        {"device": "cpu", "output": Path("x"), "lengths": (32, 64, 128), "heads": 2, "kv_heads": 1, "head_dim": 8}
    ).on("cpu")
    benchmark = bench._Benchmark(settings, Corpus("here", b"some text"), torch.device("cpu"))

    def measure_memory(measurement, context):
        if measurement.row == "lssa" and len(context) >= 64:
            raise torch.OutOfMemoryError("no room")
        return 0.001

    monkeypatch.setattr(benchmark, "_measure_memory", measure_memory)
    benchmark.run()
    statuses = {key: found.status for key, found in benchmark.measurements.items()}
    assert statuses[32, "lssa"] == "measured"
    assert statuses[64, "lssa"] == statuses[128, "lssa"] == "skipped"
    assert "memory: already ended at 64 tokens" in benchmark.measurements[128, "lssa"].skipped
    assert statuses[128, "softmax"] == "measured"


def test_a_row_that_fails_in_any_way_ends_alone_and_says_what_failed(monkeypatch):
    class OutOfResources(Exception):  # Triton's errors are no RuntimeError
        pass

    settings = RequestedBench(
        {"device": "cpu", "output": Path("x"), "lengths": (32,), "heads": 2, "kv_heads": 1, "head_dim": 8}
    ).on("cpu")
    benchmark = bench._Benchmark(settings, Corpus("here", b"some text"), torch.device("cpu"))

    def measure_memory(measurement, context):
        if measurement.row == "lssa":
            raise OutOfResources("shared memory, Required: 300000, Hardware limit: 232448")
        return 0.001

    monkeypatch.setattr(benchmark, "_measure_memory", measure_memory)
    benchmark.run()
    assert benchmark.measurements[32, "lssa"].failed.startswith("OutOfResources: shared memory")
    statuses = {row: found.status for (_, row), found in benchmark.measurements.items()}
    assert statuses == {row: "failed" if row == "lssa" else "measured" for row in ROWS}


def test_progress_is_one_line_per_step_without_a_terminal(sightline_here):
    result = sightline_here("bench", *SMALL, "--lengths", "32", "--repetitions", "2")
    lines = result.stderr.splitlines()
    assert "\r" not in result.stderr
    assert sum("memory of" in line for line in lines) == len(ROWS)
    assert sum("time, round" in line for line in lines) == 2


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bit_dtypes_run(sightline_here, tmp_path, dtype):
    result = sightline_here("bench", *SMALL, "--lengths", "48", "--repetitions", "1", "--dtype", dtype)
    assert result.returncode == 0, result.stderr
    document = load(tmp_path / "sightline-bench")
    assert document["dtype"] == dtype
    assert [found["status"] for found in document["results"]] == ["measured"] * len(ROWS)


def test_eager_takes_the_memory_of_all_its_weights_and_sdpa_does_not(sightline, tmp_path):
    result = sightline("bench", *SMALL, "--lengths", "2048", "--repetitions", "1")
    assert result.returncode == 0, result.stderr
    peaks = {found["row"]: found["peak_extra_bytes"] for found in load(tmp_path / "sightline-bench")["results"]}
    scores_and_weights = 2 * 2 * 2048**2 * 4
    assert peaks["eager"] > scores_and_weights
    assert peaks["sdpa"] < scores_and_weights / 2


def test_rows_over_the_memory_limit_are_skipped_by_name(sightline_here, tmp_path):
    result = sightline_here("bench", *SMALL, "--lengths", "64,1024", "--repetitions", "1", "--memory-limit", "8MiB")
    assert result.returncode == 0, result.stderr
    found = {(entry["tokens"], entry["row"]): entry for entry in load(tmp_path / "sightline-bench")["results"]}
    assert found[64, "eager"]["status"] == "measured"
    assert found[1024, "eager"]["status"] == "skipped"
    assert "memory: needs about" in found[1024, "eager"]["reason"]
    assert "8.0 MiB" in found[1024, "eager"]["reason"]
    assert found[1024, "sdpa"]["status"] == "measured"
    assert "skipped (memory" in result.stdout


def test_rows_over_the_time_limit_are_skipped_by_name(sightline_here, tmp_path):
    result = sightline_here("bench", *SMALL, "--lengths", "64,128", "--repetitions", "1", "--time-limit", "1e-9")
    assert result.returncode == 0, result.stderr
    results = load(tmp_path / "sightline-bench")["results"]
    assert {entry["status"] for entry in results} == {"skipped"}
    assert all(entry["reason"].startswith("time: ") for entry in results)


def test_on_the_reference_backend_every_row_of_ours_counts_as_materialising(sightline, tmp_path):
    environment = os.environ | {"SIGHTLINE_BACKEND": "reference"}
    arguments = ("--lengths", "1024", "--repetitions", "1", "--memory-limit", "8MiB")
    result = sightline("bench", *SMALL, *arguments, env=environment)
    assert result.returncode == 0, result.stderr
    document = load(tmp_path / "sightline-bench")
    assert document["backend"] == "reference"
    assert [found["row"] for found in document["results"] if found["status"] == "measured"] == ["sdpa"]


def test_a_backend_that_does_not_exist_is_one_line(sightline):
    result = sightline("bench", *SMALL, env=os.environ | {"SIGHTLINE_BACKEND": "abacus"})
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert "SIGHTLINE_BACKEND" in result.stderr


def test_a_short_text_is_repeated_and_the_user_told(sightline_here, tmp_path):
    (tmp_path / "short.txt").write_text("twelve chars")
    result = sightline_here("bench", *SMALL, "--lengths", "30", "--repetitions", "1", "--text", "short.txt")
    assert result.returncode == 0, result.stderr
    assert "text has 12 tokens and is repeated: 3 times for 30 tokens" in result.stdout
    assert load(tmp_path / "sightline-bench")["text"] == {"source": "short.txt", "tokens": 12, "repeats": {"30": 3}}


def test_without_matplotlib_the_json_is_written_and_the_remedy_named(sightline, tmp_path):
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden/matplotlib.py").write_text("raise ImportError('hidden from this test')")
    paths = [str(tmp_path / "hidden"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    result = sightline("bench", *SMALL, "--lengths", "32", "--repetitions", "1", env=environment)
    assert result.returncode == 0, result.stderr
    assert "pip install sightline[plot]" in result.stderr
    assert "Traceback" not in result.stderr
    assert len(load(tmp_path / "sightline-bench")["results"]) == len(ROWS)
    assert not (tmp_path / "sightline-bench/bench.png").exists()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--dtype", "float8"], "--dtype"),
        (["--lengths", "1024,many"], "--lengths"),
        (["--lengths", "1024,0"], "--lengths"),
        (["--lengths", ""], "--lengths"),
        (["--lengths", "1024,2147483584"], "--lengths"),
        (["--text", "missing.txt"], "--text"),
        (["--text", "empty.txt"], "--text"),
        (["--text", "."], "--text"),
        (["--output", "empty.txt"], "--output"),
        (["--heads", "6", "--kv-heads", "4"], "--heads"),
        (["--kv-heads", "0"], "--kv-heads"),
        (["--head-dim", "7"], "--head-dim"),
        (["--layers", "-1"], "--layers"),
        (["--threads", "two"], "--threads"),
        (["--threads", "2147483648"], "--threads"),
        (["--repetitions", "0"], "--repetitions"),
        (["--time-limit", "0"], "--time-limit"),
        (["--time-limit", "nan"], "--time-limit"),
        (["--memory-limit", "much"], "--memory-limit"),
        (["--memory-limit", "1e400"], "--memory-limit"),
        (["--device", "abacus"], "--device"),
        (["--device", "cuda:99"], "--device"),
        (["--no-such-argument"], "--no-such-argument"),
    ],
)
def test_wrong_input_is_one_line_that_names_the_argument(monkeypatch, capsys, tmp_path, arguments, named):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").touch()
    with pytest.raises(SystemExit) as exit_info:
        main(["bench", *arguments])
    assert exit_info.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert "error:" in printed.err
    assert named in printed.err


def test_wrong_input_ends_the_process_without_a_traceback(sightline):
    result = sightline("bench", "--text", "missing.txt")
    assert result.returncode == 2
    assert result.stdout == ""
    assert (
        result.stderr == "sightline bench: error: argument --text: cannot read missing.txt: No such file or directory\n"
    )


def test_ctrl_c_half_way_writes_what_was_measured(tmp_path):
    arguments = [*SMALL, "--lengths", "32,64", "--repetitions", "1000000", "--time-limit", "3600"]
    process = subprocess.Popen(
        [sys.executable, "-m", "sightline", "bench", *arguments],
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A shell that runs its commands in the background lets them ignore the signal, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        for line in process.stderr:
            if "time, round 3 " in line:
                break
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert "interrupted; 5 of 10 rows were measured and written" in errors
    document = load(tmp_path / "sightline-bench")
    assert document["interrupted"] is True
    statuses = {(found["tokens"], found["status"]) for found in document["results"]}
    assert statuses == {(32, "measured"), (64, "not reached")}


def test_results_replace_earlier_ones_whole_or_not_at_all(monkeypatch, sightline_here, tmp_path):
    before = '{"old": 1}'
    folder = tmp_path / "sightline-bench"
    folder.mkdir()
    (folder / "bench.json").write_text(before)
    write = Path.write_text

    def full(self, text, *arguments, **options):
        write(self, text[:10], *arguments, **options)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", full)
    result = sightline_here("bench", *SMALL, "--lengths", "32", "--repetitions", "1")
    assert result.returncode == 1
    assert "sightline LSSAR" in result.stdout
    assert result.stderr.splitlines()[-1] == "sightline bench: error: [Errno 28] No space left on device"
    assert [path.name for path in folder.iterdir()] == ["bench.json"]
    assert (folder / "bench.json").read_text() == before


def test_a_length_that_no_memory_holds_is_skipped_and_the_others_measured(sightline_here, tmp_path):
    result = sightline_here("bench", *SMALL, "--lengths", "32,2147483583", "--repetitions", "1")
    assert result.returncode == 0, result.stderr
    statuses = {(found["tokens"] > 32, found["status"]) for found in load(tmp_path / "sightline-bench")["results"]}
    assert statuses == {(False, "measured"), (True, "skipped")}


def test_what_was_measured_is_written_whatever_ends_the_run(monkeypatch, sightline_here, tmp_path):
    context = Corpus.context

    def fails(self, length):
        if length == 64:
            raise MemoryError
        return context(self, length)

    monkeypatch.setattr(Corpus, "context", fails)
    monkeypatch.setattr(bench._Benchmark, "_first_run", lambda self, row, length: 0.01)
    with pytest.raises(MemoryError):
        sightline_here("bench", *SMALL, "--lengths", "32,64", "--repetitions", "1")
    statuses = {(found["tokens"], found["status"]) for found in load(tmp_path / "sightline-bench")["results"]}
    assert statuses == {(32, "measured"), (64, "not reached")}


def test_outside_of_the_main_thread_results_are_written_too(tmp_path):
    arguments = [*SMALL, "--lengths", "32", "--repetitions", "1", "--output", str(tmp_path / "found")]
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(main, ["bench", *arguments]).result() == 0
    assert load(tmp_path / "found")["results"]
