"""The parts of attention that the bench module times, and the machine's rates: that they are measured, not how fast."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest

PARTS = ("packing", "scores", "weights", "values")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("weighting", ["softmax", "lssa"])
@pytest.mark.parametrize(("rows", "keys", "width"), [(1, 1, 1), (70, 130, 20), (600, 100, 64)])
def test_every_part_takes_time(
    bench: ModuleType, isa: str, dtype: str, weighting: str, rows: int, keys: int, width: int
) -> None:
    found = bench.attention_parts(isa, dtype, weighting, rows=rows, keys=keys, width=width, repetitions=3)
    assert all(0 < found[part] < 10 for part in PARTS)
    # The rows of a unit of work: at most 512 (csrc/cpu/forward_unit.h).
    assert found["entries"] % (3 * keys) == 0
    assert 1 <= found["entries"] // (3 * keys) <= min(rows, 512)


def test_more_keys_take_more_time_but_for_rows_that_are_packed_once(bench: ModuleType, isa: str) -> None:
    few, many = (bench.attention_parts(isa, "float32", "lssa", rows=64, keys=keys, width=64) for keys in (64, 6400))
    assert many["entries"] == 100 * few["entries"]
    for part in ("scores", "weights", "values"):
        assert many[part] > 10 * few[part]


def test_rates_are_positive_where_there_is_an_instruction(bench: ModuleType, isa: str) -> None:
    assert 1e8 < bench.multiply_rate(isa, "float32", 0.02) < 1e13
    pairs = bench.multiply_rate(isa, "bfloat16", 0.02)
    assert (1e9 < pairs < 1e14) if isa.endswith("bf16") else pairs == 0


def test_vector_work_takes_longer_after_products_of_the_tile_unit(bench: ModuleType, isa: str) -> None:
    alone = [bench.vector_seconds(isa, turns, False, 0.02) for turns in (100, 10_000)]
    assert 0 < 10 * alone[0] < alone[1] < 1
    after = bench.vector_seconds(isa, 0, True, 0.02)
    assert (after > 0) if isa.startswith("amx") else (after == 0)
    with pytest.raises(ValueError, match="turns"):
        bench.vector_seconds(isa, -1, False)


@pytest.mark.parametrize("threads", [1, 2])
def test_memory_is_read_at_a_rate_that_a_machine_can_have(bench: ModuleType, isa: str, threads: int) -> None:
    numbers = np.ones(16 << 20, dtype=np.float32)
    # Reads that the compiler left out would take no time.
    assert 1e8 < bench.read_rate(isa, numbers, threads=threads, passes=3) < 2e12


@pytest.mark.parametrize("count", [1, 63, 257, 5000])
def test_memory_of_any_size_is_read_by_any_number_of_threads(bench: ModuleType, isa: str, count: int) -> None:
    assert bench.read_rate(isa, np.full(count, 1e-40, dtype=np.float32), threads=3, passes=2) > 0


def test_what_cannot_be_read_is_refused(bench: ModuleType) -> None:
    numbers = np.ones((4, 4), dtype=np.float32)
    for changes in ({"threads": 0}, {"passes": 0}, {"array": numbers[:0]}):
        with pytest.raises(ValueError, match="expected at least 1"):
            bench.read_rate(**{"isa": "generic", "array": numbers, "threads": 1, "passes": 1, **changes})
    for array in (numbers.astype(np.float64), numbers[:, ::2]):
        with pytest.raises(TypeError):
            bench.read_rate("generic", array)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"isa": "sse9"}, "isa"),
        ({"dtype": "float64"}, "dtype"),
        ({"weighting": "lssar"}, "weighting"),
        ({"rows": 0}, "rows"),
        ({"width": 513}, "width"),
        ({"repetitions": 0}, "repetitions"),
    ],
)
def test_wrong_arguments_are_named(bench: ModuleType, changes: dict[str, object], message: str) -> None:
    arguments = {"isa": "generic", "dtype": "float32", "weighting": "lssa", "rows": 1, "keys": 1, "width": 1}
    with pytest.raises(ValueError, match=message):
        bench.attention_parts(**{**arguments, **changes})
    with pytest.raises(ValueError, match="operands"):
        bench.multiply_rate("generic", "int8")
