"""The CPU targets of docs/performance.md: the worst case of each, what is missing, and why it is not met."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import render
from page import attention_targets, recurrence_targets, targets_section
from page.attention_targets import LENGTHS, SHORT_LENGTHS, WIDTHS
from page.targets import Measured, Target, by_machine, mebibytes, percent, times

MACHINE = {
    "device": {"kind": "cpu", "name": "Test CPU", "threads": 2},
    "instruction_set": {"chosen": "avx512_bf16"},
    "versions": {},
    "command": "a_ratio.py",
}
TARGETS = [*attention_targets.attention_targets(), *recurrence_targets.recurrence_targets()]
REGISTERS = {"register_gflops": {"float32": 500.0, "bfloat16": 1000.0}}


def document(kind: str, timings: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    return MACHINE | {"schema": f"sightline-{kind}/1", "timings": timings} | more


def attention_result(**changes: Any) -> dict[str, Any]:
    """SDPA with 150 GFLOP/s, and softmax four times as fast, a little faster than zentorch."""
    return {
        "pass": "forward",
        "causal": True,
        "batch": 1,
        "heads": 8,
        "length": 1024,
        "head_dim": 64,
        "dtype": "bfloat16",
        "implementation": "softmax",
        "error": None,
        "repetitions": 3,
        "seconds": {"median": 1.0, "p10": 1.0, "p90": 1.0},
        "gflops": 600.0,
        "ratio_to_sdpa": 4.0,
        "ratio_to_zentorch": 1.2,
        "share_of_peak": 0.6,
    } | changes


def every_case(**changes: Any) -> list[dict[str, Any]]:
    return [attention_result(length=length, head_dim=width, **changes) for length in LENGTHS for width in WIDTHS]


def row_of(text: str, *documents: dict[str, Any]) -> tuple[str, ...]:
    """(wanted, measured, where, met, why not) of the target with this text."""
    (machine,) = by_machine(documents)
    (target,) = (target for target in TARGETS if target.text == text)
    return target.row(machine, {text: "because"})[1:]


SOFTMAX = "forward, bfloat16, sightline Softmax, speed of torch SDPA"


def test_every_target_has_a_name_of_its_own_and_every_reason_a_target() -> None:
    names = [target.text for target in TARGETS]
    assert len(set(names)) == len(names)
    for reasons in targets_section.REASONS.values():
        assert reasons.keys() <= set(names)
        assert all(reasons.values())


def test_a_target_is_met_by_its_worst_case() -> None:
    timings = every_case()
    assert row_of(SOFTMAX, document("attention", timings)) == (
        "at least 4x",
        "4x",
        "D = 64, N = 1,024; 60% of peak",
        "yes",
        "",
    )
    timings[5] |= {"ratio_to_sdpa": 3.9, "share_of_peak": 0.58}
    assert row_of(SOFTMAX, document("attention", timings)) == (
        "at least 4x",
        "3.9x",
        "D = 128, N = 4,096; 58% of peak",
        "no",
        "because",
    )


def test_a_target_says_where_its_worst_case_was_timed_once() -> None:
    timings = every_case()
    timings[5] |= {"ratio_to_sdpa": 3.9, "repetitions": 1}
    assert row_of(SOFTMAX, document("attention", timings))[2] == "D = 128, N = 4,096; 60% of peak; timed once"
    assert row_of("anything, speed of torch SDPA", document("attention", timings))[2].endswith("N = 4,096; timed once")


@pytest.mark.parametrize(
    "changes",
    [
        {"pass": "backward"},
        {"causal": False},
        {"batch": 8},
        {"heads": 4},
        {"dtype": "float16"},
        {"implementation": "lssa"},
        {"length": 512},
        {"error": "failed"},
    ],
)
def test_a_target_looks_at_its_own_cases_alone(changes: dict[str, Any]) -> None:
    other = attention_result(ratio_to_sdpa=0.5, **{} if "error" in changes else changes) | changes
    assert row_of(SOFTMAX, document("attention", [*every_case(), other]))[3] == "yes"


def test_lengths_that_are_missing_keep_a_target_open() -> None:
    timings = [result for result in every_case() if (result["length"], result["head_dim"]) != (2048, 128)]
    timings = [result | {"error": "no memory"} if result["length"] == 16384 else result for result in timings]
    met = row_of(SOFTMAX, document("attention", timings))
    assert met[2:] == ("D = 64, N = 1,024; 60% of peak; N = 2,048, 16,384 unmeasured", "so far", "")
    timings[0]["ratio_to_sdpa"] = 1.0
    assert row_of(SOFTMAX, document("attention", timings))[3] == "no"


def test_without_results_a_target_is_unmeasured() -> None:
    assert row_of(SOFTMAX, document("attention", []))[1:] == ("unmeasured", "", "", "")
    section = targets_section.targets_section({"attention": document("attention", [])})
    assert "Of 45 targets 0 are met and 45 unmeasured." in section
    both = {"attention": document("attention", []), "recurrence": document("recurrence", [], memory=[])}
    section = targets_section.targets_section(both)
    assert sum("| unmeasured |" in line for line in section) == len(TARGETS)


def test_a_machine_has_the_targets_of_what_it_measured() -> None:
    for kind, title, other in (
        ("recurrence", "### Targets of additive recurrence", "### Targets of attention"),
        ("options", "### Targets of attention", "### Targets of additive recurrence"),
    ):
        section = "\n".join(targets_section.targets_section({kind: document(kind, [], memory=[])}))
        assert title in section
        assert other not in section
        assert ("torch SDPA, targets' machine" in section) == (kind == "options")


@pytest.mark.parametrize(
    ("sdpa", "ratio", "limit"),
    [
        (200.0, 3.0, ""),  # 1,000 / 200 is more than what is wanted
        (400.0, 2.0, "SDPA has 400 GFLOP/s there, products of bfloat16 in registers 1,000: at most 2.5x; "),
        (400.0, 2.6, ""),  # faster than such products: they are no limit
    ],
)
def test_what_registers_allow_is_said_where_it_is_less_than_wanted(sdpa: float, ratio: float, limit: str) -> None:
    timings = every_case()
    timings[3] |= {"gflops": sdpa * ratio, "ratio_to_sdpa": ratio}
    in_its_run = document("attention", timings, **REGISTERS)
    assert row_of(SOFTMAX, in_its_run)[-1] == limit + "because"
    parts = document("parts", [], multiply_gflops={"1": {}, "2": REGISTERS["register_gflops"]})
    assert row_of(SOFTMAX, document("attention", timings), parts)[-1] == limit + "because"
    assert row_of(SOFTMAX, document("attention", timings))[-1] == "because"


def test_zentorch_is_compared_over_both_patterns_and_short_batches() -> None:
    text = "forward, float32, sightline Softmax, B = {}, speed of zentorch"
    timings = [
        attention_result(dtype="float32", batch=8, length=length, head_dim=width, causal=causal)
        for length, width, causal in itertools.product(SHORT_LENGTHS, WIDTHS, (True, False))
    ]
    assert row_of(text.format(1), document("attention", timings))[1] == "unmeasured"
    found = row_of(text.format(8), document("attention", timings))
    assert found == ("at least 1.15x", "1.2x", "causal, D = 64, N = 64; 60% of peak", "yes", "")
    timings[-1]["ratio_to_zentorch"] = 1.1
    del timings[0]["ratio_to_zentorch"]
    found = row_of(text.format(8), document("attention", timings))
    assert found[1:4] == (
        "1.1x",
        "all keys, D = 128, N = 512; 60% of peak; causal, N = 64 unmeasured",
        "no",
    )


def test_nothing_may_be_slower_than_sdpa() -> None:
    text = "anything, speed of torch SDPA"
    slow = {"ratio_to_sdpa": 0.99, "implementation": "lssar"}
    attention = document("attention", [*every_case(), attention_result(causal=False, batch=8, length=64, **slow)])
    assert row_of(text, attention)[1:4] == (
        "0.99x",
        "sightline LSSAR, forward, all keys, bfloat16, B = 8, D = 64, N = 64",
        "no",
    )
    shape = {"heads": 32, "key_heads": 8, "head_dim": 128, "length": 1024, "dtype": "float32", "error": None}
    decoding = document("decoding", [shape | slow | {"ratio_to_sdpa": 0.9}])
    assert row_of(text, attention, decoding)[1:3] == (
        "0.9x",
        "sightline LSSAR, decoding, float32, H = 32 on 8, N = 1,024",
    )


def test_decoding_is_measured_against_a_read_of_its_caches_alone() -> None:
    text = "decoding, bfloat16, sightline LSSA, H = 32 on 8, D = 128, N = 32,768, share of the read rate"
    result = attention_targets.DECODING_CASE | {"implementation": "lssa", "error": None, "share_of_bandwidth": 0.75}
    result |= {"gigabytes_per_second": 45.0, "read_gigabytes_per_second": 60.0}
    assert row_of(text, document("decoding", [result])) == ("at least 80%", "75%", "45.0 of 60.0 GB/s", "no", "because")
    del result["read_gigabytes_per_second"]
    assert row_of(text, document("decoding", [result]))[1] == "unmeasured"


@pytest.mark.parametrize(
    ("text", "measurement", "variant", "changes"),
    [
        ("key_mask, share of the plain rate", "options", "key_mask", {}),
        ("D = 80, share of the rate at D = 128", "widths", "D = 80", {}),
        (
            "AVX2 alone, sightline LSSA, speed of torch SDPA under ATEN_CPU_CAPABILITY=avx2",
            "avx2_by_switch",
            "lssa",
            {},
        ),
        ("all threads, forward, many heads, speed of one thread", "threads", "threads: 2", {"pass": "forward"}),
        (
            "all threads, backward, one head, speed of one thread",
            "threads",
            "threads: 2",
            {"pass": "backward", "heads": 1},
        ),
        ("a window, rate over visible pairs, share of that at N = 1,024", "window", "N = 16,384", {}),
    ],
)
def test_options_are_compared_with_the_first_of_their_group(
    text: str, measurement: str, variant: str, changes: dict[str, Any]
) -> None:
    result = {"measurement": measurement, "variant": variant, "weighting": "lssa", "dtype": "float32", "heads": 8}
    result |= {"head_dim": 64, "length": 4096, "error": None, "repetitions": 3, "relative_rate": 2.0} | changes
    worse = result | {"dtype": "float16", "relative_rate": 0.5}
    others = [
        result | {"relative_rate": 0.1, "variant": "N = 1,024" if measurement == "window" else "threads: 1"},
        result | {"relative_rate": 0.1, "measurement": "avx2"},
        result | {"relative_rate": None},
        result | {"relative_rate": 0.1, "error": "failed"},
    ]
    if measurement == "threads":
        others.append(result | {"relative_rate": 0.1, "heads": 9 - result["heads"]})
    assert row_of(text, document("options", [result, *others]))[3] == "yes"
    found = row_of(text, document("options", [result, worse, *others]))
    shape = "" if measurement == "widths" else "D = 64, "
    assert found[2:] == (f"sightline LSSA, float16, {shape}N = 4,096", "no", "because")


def recurrence_result(measurement: str, name: str, seconds: float, ratio: float, **changes: Any) -> dict[str, Any]:
    case = {"measurement": measurement, "dtype": "float32", "batch": 1, "heads": 8, "width": 128, "length": 4096}
    spread = {"median": seconds, "p10": seconds, "p90": seconds}
    return case | {"implementation": name, "seconds": spread, "ratio": ratio} | changes


def test_the_formula_is_named_with_its_time_here() -> None:
    text = "causal forward, float32, speed of the chunked formula"
    timings = [
        recurrence_result("causal", "formula", 0.08192, 12.0),
        recurrence_result("causal", "formula", 0.02048, 8.0, length=1024),
    ]
    assert row_of(text, document("recurrence", timings, memory=[])) == (
        "at least 10x",
        "8x",
        "N = 1,024; the formula takes 20.0 us per token",
        "no",
        "16x the formula of the targets' machine, which takes 40 us per token; because",
    )
    timings[1]["seconds"]["median"] *= 3
    assert row_of(text, document("recurrence", timings, memory=[]))[-1] == "because"


def test_time_per_token_is_compared_over_lengths_that_fit_into_memory() -> None:
    text = "causal forward, float32, longest time per token from 4K to 1M relative to the shortest"
    seconds = {4096: 1.0, 65536: 16.8, 1048576: 256 * 1.11, 512: 1.0}
    timings = [
        recurrence_result("length", "recurrence", second, 1.0, length=length) for length, second in seconds.items()
    ]
    found = row_of(text, document("recurrence", timings, memory=[]))
    assert found[:4] == ("at most 1.1x", "1.11x", "N = 1,048,576 beside 4,096, 244.14 us per token", "no")
    timings[2] = {name: value for name, value in timings[2].items() if name not in ("seconds", "ratio")}
    timings[2]["error"] = "needs 16.0 GiB of memory"
    found = row_of(text, document("recurrence", timings, memory=[]))
    assert found[1:4] == (
        "1.05x",
        "N = 65,536 beside 4,096, 244.14 us per token; N = 1,048,576 unmeasured",
        "so far",
    )
    assert row_of(text, document("recurrence", timings[:1], memory=[]))[1] == "unmeasured"


def test_bounds_from_above_look_at_the_largest_number() -> None:
    timings = [
        recurrence_result("unordered", "products", 1.0, 0.5),
        recurrence_result("unordered", "products", 1.0, 0.8, length=1024),
        recurrence_result("backward", "backward", 1.0, 3.0),
        recurrence_result("unordered backward", "backward", 1.0, 3.5),
        recurrence_result("unordered backward", "backward", 1.0, 2.5, length=1024),
    ]
    memory = [{"dtype": "float32", "length": 1048576, "beyond_output_bytes": 65 * 2**20}]
    found = document("recurrence", timings, memory=memory)
    products = row_of("forward without order, float32, time relative to its two matrix products", found)
    assert products[1:4] == ("2x", "N = 4,096", "no")
    assert row_of("backward, causal, float32, time relative to the forward pass", found)[1:4] == (
        "3x",
        "N = 4,096",
        "yes",
    )
    assert row_of("backward, without order, float32, time relative to the forward pass", found)[1] == "3.5x"
    assert row_of("causal forward, float32, memory beyond the output at 1M", found)[1:4] == (
        "65 MiB",
        "N = 1,048,576",
        "no",
    )
    memory[0] |= {"error": "needs 16.0 GiB of memory"}
    assert row_of("causal forward, float32, memory beyond the output at 1M", found)[1] == "unmeasured"


def test_sdpa_is_compared_at_every_length_and_at_64k() -> None:
    timings = [
        recurrence_result("causal", "sdpa", 1.0, 0.5, length=512),
        recurrence_result("causal", "sdpa", 1.0, 1.5, length=1024),
        recurrence_result("length", "sdpa", 30.0, 140.0, length=65536),
    ]
    found = document("recurrence", timings, memory=[])
    assert row_of("causal forward, float32, speed of torch SDPA from 1K on", found)[1:4] == ("1.5x", "N = 1,024", "yes")
    assert row_of("causal forward, float32, speed of torch SDPA at 64K", found)[:4] == (
        "at least 150x",
        "140x",
        "SDPA takes 30.0 s",
        "no",
    )


def test_decoding_is_compared_with_the_bandwidth_with_and_without_the_call() -> None:
    microseconds = {"recurrence": 30.0, "memory": 10.0, "recurrence call": 20.0, "memory call": 2.0}
    timings = [recurrence_result("decoding", name, time * 1e-6, 1.0, length=1) for name, time in microseconds.items()]
    found = document("recurrence", timings, memory=[])
    text = "decoding, float32, B = {}, share of the time in which its state is read and written"
    assert row_of(text.format(1), found)[1:4] == ("33.33%", "10.0 of 30.0 us", "no")
    without = row_of(text.format(1) + ", calls taken off", found)
    assert without[1:4] == ("80%", "8.0 of 10.0 us; the empty call: 20.0 us", "yes")
    assert row_of(text.format(16), found)[1] == "unmeasured"


def test_decoding_in_layers_is_compared_with_their_states() -> None:
    results = [
        recurrence_result("decoding in layers", name, 1e-3, share)
        for name, share in (("recurrence", 1.0), ("memory", 0.9))
    ]
    found = document("recurrence", [result | {"layers": 16} for result in results], memory=[])
    text = "decoding in layers, float32, B = 1, share of the time in which states are read and written"
    assert row_of(text, found)[1:4] == ("90%", "16 layers", "yes")
    assert row_of(text.replace("B = 1", "B = 16"), found)[1] == "unmeasured"


def test_numbers_are_shown_with_what_decides() -> None:
    assert [times(number) for number in (0.9996, 1.15, 4.0, 12.34, 150.0)] == ["1x", "1.15x", "4x", "12.3x", "150x"]
    assert [percent(number) for number in (0.8, 0.79964, 1.0)] == ["80%", "79.96%", "100%"]
    assert mebibytes(64 * 2**20) == "64 MiB"
    least = Target("a", 1.85, lambda documents: Measured(1.8499999, "here"), times)
    assert least.row({}, {})[1:5] == ("at least 1.85x", "under 1.85x", "here", "no")
    most = Target("a", 3.0, lambda documents: Measured(3.00001, "here"), times, at_most=True)
    assert most.row({}, {})[1:5] == ("at most 3x", "over 3x", "here", "no")


def test_machines_are_told_apart_and_gpus_left_out() -> None:
    here = document("attention", every_case())
    narrow = here | {"instruction_set": {"chosen": "avx2"}}
    gpu = here | {"device": {"kind": "cuda", "name": "Test GPU", "threads": 2}}
    options = document("options", [])
    assert by_machine([here, narrow, gpu, options]) == [{"attention": here, "options": options}, {"attention": narrow}]


def test_page_begins_with_the_targets_of_every_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(targets_section.REASONS, "avx512_bf16", {SOFTMAX: "because"})
    timings = every_case(ratio_to_sdpa=3.0) + every_case(implementation="sdpa", gflops=150.0, ratio_to_sdpa=1.0)
    more = {
        "memory": [],
        "import_seconds": {"torch": 1.0, "sightline_after_torch": 0.1, "runs": 1},
        "call_overhead": [],
    }
    here = document("attention", timings, **more, **REGISTERS)
    text = render.render([here, here | {"instruction_set": {"chosen": "avx2"}}])
    first = text.index("## CPU targets on Test CPU, 2 threads, instruction set avx512_bf16")
    second = text.index("## CPU targets on Test CPU, 2 threads, instruction set avx2")
    assert first < second < text.index("## Attention on Test CPU")
    assert "no tile unit (AMX)" in text[first:second]
    row = f"| {SOFTMAX} | at least 4x | 3x | D = 64, N = 1,024; 60% of peak | no |"
    assert f"{row} because |" in text[first:second]
    assert f"{row}  |" in text[second:]
    assert "| forward, bfloat16 | 150 - 160 | 150 - 150 | 1,025 | 1,000 |" in text
