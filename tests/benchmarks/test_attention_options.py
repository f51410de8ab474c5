"""attention_options.py: every call of a group beside its first, in operations that count visible pairs alone."""

from __future__ import annotations

import argparse

import attention_options
import pytest
import render
import torch

from sightline.cli.environment import instruction_sets

ARGUMENTS = ["--heads", "4", "--length", "48", "--head-dim", "16", "--repetitions", "1", "--dtypes", "float32"]


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
    threads = torch.get_num_threads()
    assert variants["threads"] == ([] if threads == 1 else ["threads: 1", f"threads: {threads}"])
    assert variants["avx2"] == ["sdpa", "lssar"]
    assert [result["error"] for result in results] == [None] * len(results)
    first = results[0]
    for result in results[:6]:
        same_work = first["seconds"]["median"] / result["seconds"]["median"]
        assert result["relative_rate"] == pytest.approx(same_work)


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
def test_the_narrow_measurement_is_held_to_avx2() -> None:
    options = attention_options.arguments([*ARGUMENTS, "--weightings", "softmax"])
    results = attention_options.measure_under_avx2(options)
    assert [(result["variant"], result["instruction_set"]) for result in results] == [
        ("sdpa", "avx2"),
        ("softmax", "avx2"),
    ]


def test_unknown_names_are_refused() -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="expected some of softmax, lssa, lssar, got mean"):
        attention_options.names_among(list(attention_options.WEIGHTINGS), "mean")


def test_page_shows_every_result_and_what_failed() -> None:
    options = attention_options.arguments([*ARGUMENTS, "--weightings", "lssa"])
    timings = attention_options.measure(options, ["options", "window"])
    failed = timings[0] | {"measurement": "avx2", "variant": "sdpa", "error": "no such instruction"}
    document = {
        "schema": attention_options.SCHEMA,
        "device": {"kind": "cpu", "name": "Test CPU", "threads": 1},
        "instruction_set": {"chosen": "generic"},
        "versions": {},
        "command": "attention_options.py",
        "timings": [*timings, failed],
    }
    text = render.render([document])
    assert "### Masks, ALiBi and grouped queries, D = 16, N = 48, H = 4, causal forward pass" in text
    assert "### A window of 256 keys, D = 16, H = 4, causal forward pass" in text
    for result in timings:
        row = f"| float32, sightline LSSA | {result['variant']} | {render.milliseconds(result['seconds'])} | "
        assert row + f"{result['gflops']:,.0f} | {result['relative_rate']:.2f} |" in text
    assert "| float32, sightline LSSA | torch SDPA | failed: no such instruction |  |  |" in text
