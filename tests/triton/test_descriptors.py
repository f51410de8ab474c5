"""Which tensors suit tensor descriptors, and where the memory that these need comes from."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import make_dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import triton

from sightline.triton import compat, launch
from sightline.triton.arguments import heads_view
from sightline.triton.descriptors import can_be_described, keys_can_be_described, rows_can_be_described
from sightline.triton.tiles import Tile

WHOLE = (2, 3, 40, 64)


def memory(*shape: int, dtype: torch.dtype = torch.float16, elements_in: int = 0) -> Tensor:
    """Empty memory that starts on a 16-byte boundary, or so many elements after one."""
    size = 1
    for count in shape:
        size *= count
    whole = torch.empty(size + 64, dtype=dtype)
    start = -whole.data_ptr() % 16 // whole.element_size()
    return whole[start + elements_in : start + elements_in + size].view(shape)


FITTING: dict[str, Callable[[], Tensor]] = {
    "contiguous": lambda: memory(*WHOLE),
    "fp32": lambda: memory(2, 3, 40, 16, dtype=torch.float32),
    "heads inside": lambda: memory(2, 40, 3, 64).transpose(1, 2),
    "part of wide rows": lambda: memory(2, 3, 40, 192)[..., 64:128],
    "shared heads": lambda: memory(1, 1, 40, 64).expand(2, 3, 40, 64),
    "one head at an odd stride": lambda: memory(41 * 64 + 1).as_strided(
        (1, 1, 40, 64), (41 * 64 + 1, 41 * 64 + 1, 64, 1)
    ),
    "eight elements in": lambda: memory(*WHOLE, elements_in=8),
}
UNFIT: dict[str, Callable[[], Tensor]] = {
    "one element in": lambda: memory(*WHOLE, elements_in=1),
    "odd rows": lambda: memory(2, 3, 40, 65)[..., :64],
    "odd heads": lambda: memory(2 * 3 * 40 * 65).as_strided(WHOLE, (3 * 40 * 64 + 24, 40 * 64 + 1, 64, 1)),
    "odd batches": lambda: memory(2 * 3 * 40 * 65).as_strided(WHOLE, (3 * 40 * 64 + 1, 40 * 64, 64, 1)),
    "width of 80": lambda: memory(2, 3, 40, 80),
    "eight bytes wide": lambda: memory(2, 3, 40, 4),
    "narrower than a tile": lambda: memory(2, 3, 40, 8),
    "no keys": lambda: memory(2, 3, 0, 64),
    "one row for all keys": lambda: memory(2, 3, 1, 64).expand(WHOLE),
}


@pytest.mark.parametrize("make", FITTING.values(), ids=FITTING.keys())
def test_what_lies_on_16_byte_boundaries_can_be_described(make: Callable[[], Tensor]) -> None:
    assert can_be_described(make())


@pytest.mark.parametrize("make", UNFIT.values(), ids=UNFIT.keys())
def test_what_does_not_is_left_to_pointers(make: Callable[[], Tensor]) -> None:
    assert not can_be_described(make())


@pytest.mark.parametrize("unfit", ["key", "value"])
def test_a_tile_with_descriptors_takes_pointers_for_tensors_that_do_not_fit(
    unfit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    Flags = make_dataclass("Flags", [("descriptors", bool), ("specialized", bool)])
    monkeypatch.setattr(launch, "can_be_specialized", lambda variant: True)
    tile = Tile(64, 64, 4, 2, descriptors=True, specialized=True)

    class Inputs:
        key = heads_view(FITTING["contiguous"]())
        value = heads_view(FITTING["contiguous"]())
        alibi_slopes = None

    problem: Any = Inputs()

    def described(tile: Tile) -> Any:
        return launch._described(problem, Flags(False, False), tile, lambda: keys_can_be_described(problem))

    assert described(tile) == Flags(True, True)
    assert described(Tile(64, 64, 4, 2)) == Flags(False, False)
    problem.alibi_slopes = torch.ones(3)
    assert described(tile) == Flags(True, False)
    setattr(problem, unfit, heads_view(UNFIT["one element in"]()))
    assert described(tile) == Flags(False, False)


@pytest.mark.parametrize("unfit", [None, "query", "gradient"])
def test_rows_are_described_where_queries_and_gradients_fit(unfit: str | None) -> None:
    class Inputs:
        query = heads_view((UNFIT["odd rows"] if unfit == "query" else FITTING["contiguous"])())

    problem: Any = Inputs()
    gradient = heads_view((UNFIT["one element in"] if unfit == "gradient" else FITTING["heads inside"])())
    assert rows_can_be_described(problem, gradient) is (unfit is None)


def test_the_allocator_of_the_caller_stays_his_own() -> None:
    from triton.runtime._allocation import _allocator

    def of_the_caller(size: int, alignment: int, stream: int | None) -> Any:
        raise AssertionError

    seen: list[Any] = []

    def launch_somewhere() -> None:
        triton.set_allocator(of_the_caller)
        compat.with_scratch_memory(lambda: seen.append(_allocator.get()))
        seen.append(_allocator.get())

    thread = threading.Thread(target=launch_somewhere)
    thread.start()
    thread.join()
    assert seen == [compat._scratch_memory, of_the_caller]


def test_a_specialised_kernel_leaves_the_sharing_of_registers_to_its_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "compiles_for_amd", lambda: False)
    assert compat.launch_options(8, 2) == {"num_warps": 8, "num_stages": 2, "maxnreg": 255}
    assert compat.launch_options(8, 2, specialized=True) == {"num_warps": 8, "num_stages": 2}
