"""The measuring half of a GPU check, on the CPU: what it compares computes what it claims, and errors are findings."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu import cases, measure, peers, sanitize, skips, summary, tune
from gpu.cases import Case
from torch.nn.attention.flex_attention import create_block_mask

import sightline as sl
from sightline.triton import launch
from sightline.triton.tiles import Tile

CPU = torch.device("cpu")
SMALL = Case("forward", "float32", 16, 48, True, 2, 4, 4)


def wall_clock(call: Callable[[], Any], calls: int, deterministic: bool) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls


@pytest.fixture(autouse=True)
def our_kernels_are_those_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    make = peers.make

    def made(name: str, case: Case) -> Any:
        attention = make(name, case)
        if isinstance(attention, partial) and attention.func is sl.attention:
            return partial(attention, backend="native")
        return attention

    monkeypatch.setattr(peers, "make", made)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("weighting", ["softmax", "lssa"])
def test_flex_attention_computes_the_same_mathematics(weighting: str, causal: bool) -> None:
    case = Case("forward", "float32", 16, 128, causal, 1, 2, 2)
    inputs = measure.inputs_of(case, CPU)
    mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, 128, 128, device="cpu") if causal else None
    output = peers.flex_call(weighting, causal, "TRITON", mask)(*inputs)
    expected = sl.attention(*inputs, weighting=peers.WEIGHTINGS[weighting], causal=causal)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("direction", ["forward", "backward", "forward+backward", "decode"])
def test_implementations_take_turns_and_are_checked_first(direction: str) -> None:
    case = Case(direction, "float32", 16, 48, True, 2, 4, 2 if direction == "decode" else 4)
    names = ("sdpa-math", "softmax", "lssa", "lssar") + (() if direction == "decode" else ("eager",))
    results = measure.measure_case(case, names, CPU, wall_clock, lambda call: call)
    rate = "gigabytes_per_second" if direction == "decode" else "tflops"
    for name in names:
        assert results[name].get("error") is None, results[name]
        assert results[name][rate] > 0
        assert results[name]["repetitions"] >= 3


def test_decoding_is_timed_as_called_and_as_a_graph() -> None:
    case = Case("decode", "float32", 16, 48, True, 2, 4, 2)
    captured: list[Any] = []

    def capture(call: Callable[[], Any]) -> Callable[[], Any]:
        captured.append(call)
        return call

    results = measure.measure_case(case, ("softmax", "no-such"), CPU, wall_clock, capture)
    assert list(results) == ["softmax", "softmax, CUDA graph", "no-such", "no-such, CUDA graph"]
    assert results["softmax, CUDA graph"]["gigabytes_per_second"] > 0
    assert "error" in results["no-such, CUDA graph"]
    assert len(captured) == 1


@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
def test_the_recurrence_is_measured_and_checked(direction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(direction, "float32", 16, 600, True, 1, 2, 2, "recurrence")
    make = peers.make

    def made(name: str, case: Case) -> Any:
        if name == "wrong":
            return lambda query, key, value: sl.additive_recurrence(query, key, value * 1.1)
        return partial(make(name, case), backend="native") if name == "recurrence" else make(name, case)

    monkeypatch.setattr(peers, "make", made)
    results = measure.measure_case(case, ("recurrence", "fla-lightnet", "wrong"), CPU, wall_clock)
    assert results["recurrence"]["tflops"] > 0
    assert "wrong result" in results["wrong"]["error"]
    assert "seconds" in results["fla-lightnet"] or "fla" in results["fla-lightnet"]["error"]
    flops = measure.rates(case, measure.Spread(1e-3, 1e-3, 1e-3))["tflops"] * 1e12 * 1e-3
    assert flops == pytest.approx(4 * 2 * 600 * 16**2 * (3 if "backward" in direction else 1))


def test_the_recurrence_is_a_gated_one_with_the_decays_of_its_keys() -> None:
    def gated(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, scale: float) -> Any:
        state = torch.zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3])
        rows = []
        for token in range(q.shape[1]):
            state = g[:, token].exp()[..., None] * state + k[:, token][..., None] * v[:, token][..., None, :]
            rows.append(scale * (q[:, token][..., None, :] @ state)[..., 0, :])
        return torch.stack(rows, 1), None

    inputs = [torch.randn(2, 3, 40, 8) for _ in range(3)]
    torch.testing.assert_close(peers.lightnet_by_gla(gated, *inputs), sl.additive_recurrence(*inputs))


def test_a_wrong_result_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    make = peers.make

    def wrong(name: str, case: Case) -> Any:
        return (lambda query, key, value: value * 1.1) if name == "eager" else make(name, case)

    monkeypatch.setattr(peers, "make", wrong)
    results = measure.measure_case(SMALL, ("eager", "softmax"), CPU, wall_clock)
    assert "wrong result: relative error" in results["eager"]["error"]
    assert "seconds" in results["softmax"]


def test_an_implementation_that_is_not_there_leaves_the_others_alone() -> None:
    results = measure.measure_case(SMALL, ("sdpa-cudnn", "no-such", "lssa"), CPU, wall_clock)
    assert "error" in results["no-such"]
    assert "error" in results["sdpa-cudnn"]
    assert "seconds" in results["lssa"]


def test_what_holds_all_pairs_is_left_out_where_memory_ends() -> None:
    large = cases.dense("backward", 128, 65536, True)
    for name in ("eager", "sdpa-math"):
        assert "memory: needs about" in peers.needs_too_much(name, large, 2**37)
        assert peers.needs_too_much(name, SMALL, 2**37) is None
    assert peers.needs_too_much("sdpa-flash", large, 2**37) is None


def test_rates_count_useful_work() -> None:
    spread = measure.Spread(1e-3, 1e-3, 1e-3)
    forward, backward = (
        measure.rates(cases.dense(direction, 128, 4096, False), spread)["tflops"]
        for direction in ("forward", "backward")
    )
    assert forward == pytest.approx(4 * 4 * 16 * 4096**2 * 128 / 1e-3 / 1e12)
    assert backward == pytest.approx(2.5 * forward)
    decoding = measure.rates(cases.decode(128, 32768), spread)["gigabytes_per_second"]
    assert decoding == pytest.approx(2 * 16 * 8 * 32768 * 128 * 2 / 1e-3 / 1e9)


def test_cases_that_are_done_are_left_out(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    group = cases.Group("small", (SMALL, cases.Case("forward", "float32", 16, 64, True, 1, 2, 2)), ("lssa",), 5.0)
    monkeypatch.setattr(cases, "groups", lambda: iter([group]))
    monkeypatch.setattr(measure, "seconds_per_call", wall_clock)
    monkeypatch.setattr(measure, "measure_case", partial(measure.measure_case, timer=wall_clock))
    before = {"cases": {group.key(SMALL): {}}}
    monkeypatch.setattr(measure, "found_before", lambda: before)
    measure.measure_group(group, CPU)
    running, found = map(json.loads, capsys.readouterr().out.splitlines())
    last = {"kind": "running", "name": "small", "case": group.key(group.cases[1]), "implementation": "lssa"}
    assert running == last
    assert found["name"] == group.key(group.cases[1])
    assert found["results"]["lssa"]["tflops"] > 0
    findings = {"cases": {found["name"]: found}, "peaks": {"float32": {"tflops": 1.0}}}
    ((case, name, milliseconds, _, rate, share),) = summary.case_rows(findings, "forward")
    assert (case, name) == (group.cases[1].name, "lssa")
    assert float(milliseconds) > 0
    assert rate.endswith("TFLOP/s")
    assert share.endswith("%")


@pytest.mark.parametrize("shape", sanitize.SHAPES, ids=["fp16", "bf16"])
@pytest.mark.parametrize("weighting", sanitize.WEIGHTINGS, ids=["softmax", "lssa", "lssar"])
def test_what_the_sanitizer_watches_is_right(weighting: Any, shape: Any) -> None:
    errors = sanitize.check(weighting, CPU, "native", shape) + sanitize.check_decoding(weighting, CPU, "native", shape)
    assert len(errors) == 5
    assert all(math.isfinite(error) and error <= sanitize.ALLOWED_ERROR for error in errors)


def test_the_sanitizer_watches_every_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    everything = sanitize.calls(CPU, native=False)
    assert len(everything) == 2 * 3 * 2 + 2
    monkeypatch.setattr(sanitize, "decode_refusal", lambda *arguments: None)
    assert all("CUDA" in name for name in sanitize.calls(CPU, native=True))
    assert len(sanitize.calls(CPU, native=True)) == 6
    assert len(sanitize.calls(CPU, native=False)) == len(everything) + 6


@pytest.mark.parametrize("causal", [False, True])
def test_the_recurrence_that_the_sanitizer_watches_is_right(causal: bool) -> None:
    errors = sanitize.check_recurrence(causal, CPU, backend="native")
    assert len(errors) == 4
    assert all(math.isfinite(error) and error <= sanitize.ALLOWED_ERROR for error in errors)


@pytest.mark.parametrize("causal", [False, True])
def test_what_tuning_runs_reaches_forward_and_backward(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[bool] = []
    attend = sl.attention

    def watched(query: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        calls.append(query.requires_grad)
        return attend(query, *arguments, **options)

    monkeypatch.setattr(tune.sl, "attention", watched)
    tune.tune(sl.LSSAR(), Case("forward", "float32", 16, 48, causal, 1, 2, 2), CPU, backend="native")
    assert calls == [False, True]


def test_tuned_tiles_are_findings(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tune, "tuning_file", lambda: tmp_path / "tiles.json")
    for owner in ("sightline.triton.tuning", "gpu.tune"):
        monkeypatch.setattr(f"{owner}.target_name", lambda: "cuda-90")
    tune.TunedTiles(tmp_path / "tiles.json").keep("a kind", Tile(64, 32, 8, 2, descriptors=True))
    tune.record_tiles()
    finding = json.loads(capsys.readouterr().out)
    text = "64 x 32, 8 warps, 2 stages, descriptors"
    written = {"kernels": tune.kernels_fingerprint(), "target": "cuda-90"}
    expected = {"kind": "tiles", "name": "a kind", "tile": [64, 32, 8, 2, True, False], "text": text, **written}
    assert finding == expected
    assert summary.tile_rows({"tiles": {finding.pop("name"): finding}}) == [["a kind", text]]


def test_shares_of_skipped_tiles_are_findings_beside_the_times(capsys: pytest.CaptureFixture[str]) -> None:
    before = launch.LEAST_SKIPPING_TILES
    settings: list[int] = []

    def timer(call: Callable[[], Any], calls: int, deterministic: bool) -> float:
        settings.append(launch.LEAST_SKIPPING_TILES)
        return 2.0 if before != launch.LEAST_SKIPPING_TILES else 1.0

    for kind in (skips.random_keys, skips.clustered_keys):
        query, key = kind(300, 2, 16, CPU)
        assert query.shape == key.shape == (1, 2, 300, 16)
        skips.measure_skips("some keys", query, key, True, timer, "native")
        found = json.loads(capsys.readouterr().out)
        assert found["gain"] == 2.0
        assert found["seconds"] == {"skipping": 1.0, "whole": 2.0}
    assert set(settings) == {before, skips._NEVER}
    assert before == launch.LEAST_SKIPPING_TILES


def test_recorded_keys_of_a_trained_model_are_there_and_measured_from_the_first_tile(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert skips.RECORDED.stat().st_size < 10**6
    recorded = torch.load(skips.RECORDED, weights_only=True)
    query, key = recorded["query"], recorded["key"]
    assert query.shape == key.shape == (6, 2, 512, 32)
    assert 0.1 < float(key.float().std()) < 10
    before, settings = launch.LEAST_SKIPPING_TILES, []

    def timer(call: Callable[[], Any], calls: int, deterministic: bool) -> float:
        settings.append(launch.LEAST_SKIPPING_TILES)
        return 1.0

    skips.measure_skips("recorded keys", query, key, False, timer, "native", least_tiles=1)
    assert json.loads(capsys.readouterr().out)["seconds"] == {"skipping": 1.0, "whole": 1.0}
    assert set(settings) == {1, skips._NEVER}
    assert before == launch.LEAST_SKIPPING_TILES
