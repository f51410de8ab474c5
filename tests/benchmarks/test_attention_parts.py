"""attention_parts.py: every part of every case, and the page that shows them."""

from __future__ import annotations

import attention_parts
import machine_rates
import render
import required

from sightline.cli.environment import describe_device, instruction_sets, versions


def test_parts_and_rates_are_shown() -> None:
    try:
        bench = machine_rates.bench_module()
    except FileNotFoundError:
        required.missing("the module _bench was not built (needs Python's headers)")
    isa = instruction_sets()["chosen"]
    rates = {threads: machine_rates.multiply_rates(bench, isa, threads, 0.01) for threads in (1, 2)}
    assert rates[2]["float32"] > 0
    case = {"dtype": "float32", "weighting": "lssa", "head_dim": 16, "length": 100}
    found = attention_parts.time_parts(bench, isa, case, 3)
    assert found["nanoseconds"].keys() == set(attention_parts.PARTS)
    assert min(found["nanoseconds"].values()) > 0
    document = {
        "schema": attention_parts.SCHEMA,
        "command": "attention_parts.py",
        "device": describe_device(attention_parts.torch.device("cpu")),
        "versions": versions(),
        "instruction_set": instruction_sets(),
        "multiply_gflops": {str(threads): rate for threads, rate in rates.items()},
        "read_gigabytes_per_second": 12.3,
        "timings": [found],
    }
    page = render.render([document])
    assert "read with 12.3 GB/s" in page
    assert "| float32, sightline LSSA, D = 16, N = 100 |" in page
