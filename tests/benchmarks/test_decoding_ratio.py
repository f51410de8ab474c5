"""decoding_ratio.py: rates count a case's caches, and shares refer to a read of the same caches by as many threads."""

from __future__ import annotations

import decoding_ratio
import numpy as np
import pytest
import render
import torch

ARGUMENTS = ["--lengths", "40", "--repetitions", "2", "--dtypes", "bfloat16"]
SHAPE = (4, 2, 16)
CACHE_BYTES = 2 * 2 * 40 * 16 * 2


@pytest.fixture
def few_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """One small case, with three caches and calls of two."""
    monkeypatch.setattr(decoding_ratio, "HEADS", (SHAPE,))
    monkeypatch.setattr(decoding_ratio, "CACHE_BYTES", 3 * CACHE_BYTES)
    monkeypatch.setattr(decoding_ratio, "SAMPLE_BYTES", 2 * CACHE_BYTES)


class Bench:
    """A bench module that reads 50 GB/s, then 100, and so on."""

    def __init__(self) -> None:
        self.reads: list[tuple[int, int]] = []

    def read_rate(self, isa: str, array: np.ndarray, threads: int, passes: int) -> float:
        self.reads.append((array.nbytes, threads))
        return 50e9 * len(self.reads)


@pytest.mark.usefixtures("few_bytes")
def test_the_caches_of_the_case_are_read_in_every_round(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench()
    monkeypatch.setattr(decoding_ratio, "bench_module", lambda: bench)
    found = decoding_ratio.measure(decoding_ratio.arguments(ARGUMENTS))
    assert bench.reads == [(3 * CACHE_BYTES, torch.get_num_threads())] * 3
    assert found.keys() == {"timings"}
    assert [result["implementation"] for result in found["timings"]] == ["sdpa", "softmax", "lssa", "lssar"]
    for result in found["timings"]:
        assert result["error"] is None
        assert result["repetitions"] == 2
        assert result["gigabytes_per_second"] == pytest.approx(CACHE_BYTES / result["seconds"]["median"] / 1e9)
        assert result["read_gigabytes_per_second"] == pytest.approx(150.0)  # the fastest
        assert result["share_of_bandwidth"] == pytest.approx(result["gigabytes_per_second"] / 150.0)


@pytest.mark.usefixtures("few_bytes")
def test_without_a_bench_module_shares_refer_to_a_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise FileNotFoundError("build it")

    monkeypatch.setattr(decoding_ratio, "bench_module", missing)
    monkeypatch.setattr(decoding_ratio, "summing_bandwidth", lambda: 20.0)
    found = decoding_ratio.measure(decoding_ratio.arguments(ARGUMENTS))
    assert found["read_gigabytes_per_second"] == 20.0
    for result in found["timings"]:
        assert result["share_of_bandwidth"] == result["gigabytes_per_second"] / 20.0
        assert "read_gigabytes_per_second" not in result


@pytest.mark.usefixtures("few_bytes")
def test_page_says_what_shares_of_bandwidth_refer_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding_ratio, "bench_module", Bench)
    document = {
        "schema": decoding_ratio.SCHEMA,
        "device": {"kind": "cpu", "name": "Test CPU", "threads": 1},
        "instruction_set": {"chosen": "generic"},
        "versions": {},
        "command": "decoding_ratio.py",
        **decoding_ratio.measure(decoding_ratio.arguments(ARGUMENTS)),
    }
    text = render.render([document])
    assert "refer to a read of the same caches" in text
    first = document["timings"][0]
    assert f"| 1.00 | {first['gigabytes_per_second']:,.1f} | 150.0 | {first['share_of_bandwidth']:.0%} |" in text
    text = render.render([document | {"read_gigabytes_per_second": 20.0}])
    assert "refer to a sum of torch, which reads 20.0 GB/s" in text
