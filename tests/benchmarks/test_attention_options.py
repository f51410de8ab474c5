"""attention_options.py: every call of a group beside its first, in operations that count visible pairs alone."""

from __future__ import annotations

import argparse

import attention_options
import pytest
import render
import torch
from page.markdown import milliseconds

from sightline.cli.environment import instruction_sets

ARGUMENTS = ["--heads", "4", "--length", "48", "--head-dim", "16", "--repetitions", "1", "--dtypes", "float32"]
ARGUMENTS += ["--avx2-head-dims", "16,24"]


@pytest.mark.parametrize(("length", "window"), [(1, None), (7, None), (7, 0), (7, 2), (7, 6), (7, 100)])
def test_pairs_are_counted_as_they_are_seen(length: int, window: int | None) -> None:
    distance = torch.arange(length)[:, None] - torch.arange(length)
    seen = (distance >= 0) & (distance <= (length if window is None else window))
    assert attention_options.visible_pairs(length, window) == seen.sum().item()


def test_every_measurement_puts_its_variants_beside_the_first() -> None:
    options = attention_options.arguments([*ARGUMENTS, "--weightings", "softmax,lssar"])
    results = attention_options.measure(options, list(attention_options.GROUPS))
    variants = {
        measurement: [
            result["variant"]
            for result in results
            if (result["measurement"], result["weighting"]) == (measurement, "lssar")
        ]
        for measurement in attention_options.GROUPS
    }
    assert variants["options"] == [
        "plain",
        "key_mask",
        "boolean attn_mask",
        "float attn_mask",
        "alibi_slopes",
        "4 query heads per key head",
    ]
    assert variants["widths"] == ["D = 128", "D = 64", "D = 80", "D = 96", "D = 256"]
    assert variants["window"] == ["N = 192", "N = 1,024"]
    assert variants["avx2"] == ["sdpa", "lssar", "sdpa", "lssar"]
    assert [result["error"] for result in results] == [None] * len(results)
    first = results[0]
    for result in results[:6]:
        same_work = first["seconds"]["median"] / result["seconds"]["median"]
        assert result["relative_rate"] == pytest.approx(same_work)


def test_threads_are_compared_in_both_passes_with_many_heads_and_with_one() -> None:
    options = attention_options.arguments([*ARGUMENTS, "--weightings", "lssa"])
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        results = attention_options.measure(options, ["threads"])
        assert torch.get_num_threads() == 2
        torch.set_num_threads(1)
        assert attention_options.measure(options, ["threads"]) == []
    finally:
        torch.set_num_threads(before)
    cases = [(result["heads"], result["pass"], result["variant"], result["threads"]) for result in results]
    assert cases == [
        (heads, direction, f"threads: {threads}", threads)
        for heads in (4, 1)
        for direction in ("forward", "backward")
        for threads in (1, 2)
    ]
    forward, backward = results[0], results[2]
    operations = [result["gflops"] * result["seconds"]["median"] for result in (forward, backward)]
    assert operations[1] == pytest.approx(2.5 * operations[0])


def test_a_call_runs_on_the_threads_it_is_given() -> None:
    before, seen = torch.get_num_threads(), []
    for threads in (1, 2):
        attention_options.run_on(threads, lambda: seen.append(torch.get_num_threads()))
    assert seen == [1, 2]
    assert torch.get_num_threads() == before


def test_shares_refer_to_the_registers_of_as_many_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = {1: {"float32": 10.0}, 2: {"float32": 20.0}}
    monkeypatch.setattr(attention_options, "register_peaks", lambda: peaks)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        options = attention_options.arguments([*ARGUMENTS, "--weightings", "lssa"])
        results = attention_options.measure(options, ["threads"])
    finally:
        torch.set_num_threads(before)
    for result in results:
        assert result["share_of_peak"] == result["gflops"] / peaks[result["threads"]]["float32"]


def test_without_a_bench_module_there_are_no_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise FileNotFoundError("build it")

    monkeypatch.setattr(attention_options, "bench_module", missing)
    options = attention_options.arguments([*ARGUMENTS, "--weightings", "lssa"])
    results = attention_options.measure(options, ["window"])
    assert results
    assert all("share_of_peak" not in result for result in results)


def test_every_variant_computes_what_it_is_named_for() -> None:
    options = attention_options.arguments(ARGUMENTS)
    (group,) = attention_options.option_groups(options, torch.float32, "softmax")
    outputs = [variant.run() for variant in group.variants]
    assert len({output.double().sum().item() for output in outputs}) == len(outputs)
    assert all(output.shape == outputs[0].shape for output in outputs)


def test_a_failure_is_kept_and_leaves_the_others_without_a_ratio() -> None:
    def fail() -> None:
        raise RuntimeError("no such instruction")

    variants = [attention_options.Variant("sdpa", fail, 1.0), attention_options.Variant("softmax", lambda: None, 1.0)]
    failed, measured = attention_options.time_group(attention_options.Group("avx2", {}, variants), 2)
    assert "no such instruction" in failed["error"]
    assert "seconds" not in failed
    assert measured["error"] is None
    assert measured["relative_rate"] is None


@pytest.mark.skipif("avx2" not in instruction_sets()["available"], reason="this machine has no AVX2")
@pytest.mark.parametrize("setting", list(attention_options.AVX2_SETTINGS))
def test_the_narrow_measurement_is_held_to_avx2(setting: str) -> None:
    options = attention_options.arguments([*ARGUMENTS, "--weightings", "softmax"])
    results = attention_options.measure_under_avx2(options, setting)
    assert [(result["variant"], result["head_dim"]) for result in results] == [
        ("sdpa", 16),
        ("softmax", 16),
        ("sdpa", 24),
        ("softmax", 24),
    ]
    for result in results:
        assert (result["measurement"], result["instruction_set"]) == (setting, "avx2")


def test_one_setting_is_torchs_own_switch_alone() -> None:
    switch, every_library = attention_options.AVX2_SETTINGS.values()
    assert switch == {"ATEN_CPU_CAPABILITY": "avx2", "SIGHTLINE_ISA": "avx2"}
    assert every_library == switch | {"MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"}


def test_unknown_names_are_refused() -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="expected some of softmax, lssa, lssar, got mean"):
        attention_options.names_among(list(attention_options.WEIGHTINGS), "mean")


def test_page_shows_every_result_and_what_failed() -> None:
    options = attention_options.arguments([*ARGUMENTS, "--weightings", "lssa"])
    timings = attention_options.measure(options, ["options", "window"])
    failed = timings[0] | {"measurement": "avx2_by_switch", "variant": "sdpa", "error": "no such instruction"}
    document = {
        "schema": attention_options.SCHEMA,
        "device": {"kind": "cpu", "name": "Test CPU", "threads": 1},
        "instruction_set": {"chosen": "generic"},
        "versions": {},
        "command": "attention_options.py",
        "timings": [*timings, failed],
    }
    text = render.render([document])
    assert "### Masks, ALiBi and grouped queries, D = 16, N = 48, causal" in text
    assert "### A window of 256 keys, D = 16, causal" in text
    for result in timings:
        case = "float32, sightline LSSA, H = 4, forward"
        row = f"| {case} | {result['variant']} | {milliseconds(result['seconds'], 1)} | "
        assert row + f"{result['gflops']:,.0f} | {result['relative_rate']:.2f} |" in text
    case = "float32, sightline LSSA, H = 4, D = 16, forward"
    assert f"| {case} | torch SDPA | failed: no such instruction |  |  |  |" in text
