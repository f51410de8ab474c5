"""machine_rates.py: which rates are measured, and with how many threads."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import machine_rates
import numpy as np
import pytest

RATES = {
    ("amx_bf16", "float32"): 1e9,
    ("amx_bf16", "bfloat16"): 16e9,
    ("avx512_bf16", "bfloat16"): 2e9,
    ("avx2", "float32"): 0.5e9,
    ("avx2", "bfloat16"): 0.0,
}


class Bench:
    """A bench module that gives every kind of product a rate of its own, to three threads at a time."""

    def __init__(self, isas: tuple[str, ...]) -> None:
        self.available = isas
        self.together = threading.Barrier(3)

    def isas(self) -> list[str]:
        return list(self.available)

    def multiply_rate(self, isa: str, operands: str, seconds: float) -> float:
        self.together.wait(timeout=10)  # all threads multiply at the same time
        return RATES[isa, operands]


def test_beside_the_tile_unit_stands_what_vectors_multiply() -> None:
    bench = Bench(("avx2", "avx512_bf16", "amx_bf16"))
    rates = machine_rates.multiply_rates(bench, "amx_bf16", 3, 0.01)
    assert rates == {"float32": 3.0, "bfloat16": 48.0, "vdpbf16ps": 6.0}
    assert machine_rates.peaks_by_dtype(rates) == {"float32": 3.0, "float16": 3.0, "bfloat16": 48.0}


@pytest.mark.parametrize("isas", [("avx2",), ("avx2", "avx512_bf16", "amx_bf16")])
def test_without_products_of_bfloat16_it_is_multiplied_as_float32(isas: tuple[str, ...]) -> None:
    rates = machine_rates.multiply_rates(Bench(isas), "avx2", 3, 0.01)
    assert rates == {"float32": 1.5, "bfloat16": 0.0}
    assert machine_rates.peaks_by_dtype(rates)["bfloat16"] == 1.5


def test_memory_is_read_by_as_many_threads() -> None:
    given = []

    def read_rate(isa: str, array: np.ndarray, threads: int, passes: int) -> float:
        given.append((isa, array.size, threads, passes))
        return 25e9

    bench = SimpleNamespace(read_rate=read_rate)
    assert machine_rates.read_rate(bench, "avx2", np.ones(8, dtype=np.float32), 2, passes=4) == 25.0
    assert given == [("avx2", 8, 2, 4)]


def test_a_module_that_was_not_built_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setattr(machine_rates, "ROOT", tmp_path)
    with pytest.raises(FileNotFoundError, match="make build"):
        machine_rates.bench_module()
