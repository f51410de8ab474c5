"""Tile skipping of re-weighting (MATH.md section 2): which key tiles the second sweep need not visit.

A high power leaves a handful of effective keys per row. The first sweep leaves the largest score of every row in every
tile that all rows see as a whole; once mean and peak are known, a tile is listed for the second sweep if any row has a
weight there that counts. What is left out holds a share of less than tau of its row, below the rounding of the output;
tau and the exponent of the bound are MATH.md's. Such weights count as 0 in every respect: what is not finite does not
reach a row through them.

The second sweep walks the list, so its loop has no branch and is pipelined like any other. Maxima and list are memory
of a program. So that a launch never takes more than SCRATCH_BYTES, long problems are launched in waves of programs,
which use the same memory one after the other; and where so few would fit that the device stood idle, several tiles in a
row share a maximum, which lists some tiles more than need be.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sightline.triton.weights import positive_part, weigh

_TILES_AT_ONCE = tl.constexpr(16)
SCRATCH_BYTES = 2**26  # of one launch, at any length
_WAVE_STEP = 16  # programs: waves are multiples, so that no launch is compiled for itself
_LEAST_WAVE = 2  # programs per multiprocessor, as long as fewer than so many tiles have to share a maximum
_MOST_SHARING = 64
_LEAST_FLOAT16 = tl.constexpr(-65504.0)


class Scratch(NamedTuple):
    """What a program leaves for its own second sweep; all programs of a launch side by side."""

    maxima: Any  # (programs, groups of tiles, rows of a tile) fp16: largest score
    listed: Any  # (programs, tiles) int32: first keys of the tiles to visit
    groups: Any  # per program
    tiles: Any  # key tiles there is room for
    sharing: Any  # tiles of a group
    counts: Any  # (row tiles, 2) int32: tiles that could be skipped and tiles visited; or None


@dataclass
class TileCounts:
    """How many key tiles could have been skipped and how many were visited all the same, over some calls."""

    calls: list[Tensor] = field(default_factory=list)

    @property
    def skipped_share(self) -> float:
        """The share of the tiles seen as a whole that the second sweep did not visit; waits for the device."""
        total = torch.stack([counts.sum(0).cpu() for counts in self.calls]).sum(0)
        return 1.0 - float(total[1]) / max(1, int(total[0]))


_watching: list[TileCounts] = []


@contextlib.contextmanager
def count_tiles() -> Iterator[TileCounts]:
    """Count what the calls inside visit and skip."""
    counts = TileCounts()
    _watching.append(counts)
    try:
        yield counts
    finally:
        _watching.remove(counts)


class Maxima(NamedTuple):
    """The part of Scratch.maxima that is one program's."""

    data: Any
    sharing: Any


class Waves(NamedTuple):
    """How a problem is cut into launches: programs of each, key tiles there is room for, and tiles per maximum."""

    programs: int
    key_tiles: int
    sharing: int

    @property
    def groups(self) -> int:
        return -(-self.key_tiles // self.sharing)

    def program_bytes(self, rows: int) -> int:
        """Scratch memory of one program with tiles of so many rows."""
        return self.groups * rows * 2 + self.key_tiles * 4


def plan_waves(programs: int, key_tiles: int, rows: int, processors: int) -> Waves:
    """The fewest launches whose programs keep the device busy, and the fewest tiles per maximum, within the bound.

    >>> plan_waves(1000, 16, 64, 132), plan_waves(10**6, 2048, 128, 132)
    (Waves(programs=1000, key_tiles=16, sharing=1), Waves(programs=480, key_tiles=2048, sharing=4))
    """
    sharing, wanted = 1, min(programs, _LEAST_WAVE * processors)
    while sharing < _MOST_SHARING and Waves(wanted, key_tiles, sharing).program_bytes(rows) * wanted > SCRATCH_BYTES:
        sharing *= 2
    waves = Waves(programs, key_tiles, sharing)
    affordable = SCRATCH_BYTES // waves.program_bytes(rows)
    if programs <= affordable:
        return waves
    return waves._replace(programs=max(1, affordable // _WAVE_STEP) * _WAVE_STEP)


def make_scratch(waves: Waves, row_tiles: int, rows: int, device: torch.device) -> Scratch:
    """Memory for one launch."""
    counts = None
    if _watching:
        counts = torch.zeros(row_tiles, 2, dtype=torch.int32, device=device)
        for watcher in _watching:
            watcher.calls.append(counts)
    return Scratch(
        torch.empty(waves.programs, waves.groups, rows, dtype=torch.float16, device=device),
        torch.empty(waves.programs, waves.key_tiles, dtype=torch.int32, device=device),
        waves.groups,
        waves.key_tiles,
        waves.sharing,
        counts,
    )


@triton.jit
def least_excess(problem, variant: tl.constexpr, visible):
    """(tau / n_i)^(1/p): the share of the largest excess under which all keys of a row together hold less than tau.

    Where gradients are wanted it is 1/(p - 1), for the responses decay more slowly; at p = 1 they do not decay at all,
    and only what is exactly 0 is left out.
    """
    if variant.dtype == "fp32":
        log_tau = -24.0
    elif variant.dtype == "fp16":
        log_tau = -14.0
    else:
        log_tau = -12.0
    exponent = problem.power
    if variant.saves:
        exponent = exponent - 1.0
    decays = exponent > 0.0
    log_share = (log_tau - tl.log2(tl.where(visible < 1.0, 1.0, visible))) / tl.where(decays, exponent, 1.0)
    return tl.where(decays, tl.exp2(log_share), 0.0)


@triton.jit
def keep_maxima(variant: tl.constexpr, maxima, place, is_last, shared, largest):
    """Leave the largest scores of a group of tiles for list_tiles, at its last tile; returns those of the group so far.

    `largest` are the scores of the tile at `place`, `shared` what came back for the one before.
    """
    shared = tl.where(place % maxima.sharing == 0, largest, tl.maximum(shared, largest))
    # Below the least fp16 number stands that number: -inf would say that the tile has no weights, and NaN must stay.
    kept = tl.where(shared < _LEAST_FLOAT16, _LEAST_FLOAT16, shared).to(tl.float16)
    target = maxima.data + place // maxima.sharing * variant.row_tile + tl.arange(0, variant.row_tile)
    tl.store(target, kept, mask=((place + 1) % maxima.sharing == 0) | is_last)
    return shared


@triton.jit
def score_bound(rounded):
    """No score that was rounded to this fp16 number is larger."""
    wide = rounded.to(tl.float32)
    nothing = wide == float("-inf")
    held = tl.where(nothing, 0.0, wide)
    return tl.where(nothing, wide, held + tl.abs(held) * 0.001 + 1e-6)


@triton.jit
def list_tiles(problem, variant: tl.constexpr, maxima, listed, start, tiles, visible, peaks):
    """Write the first keys of the tiles that count for any row; returns how many there are."""
    tl.debug_barrier()  # other threads of the program wrote the maxima
    bound = least_excess(problem, variant, visible)
    rows = tl.arange(0, variant.row_tile)
    count = tiles * 0
    for first in tl.range(0, tiles, _TILES_AT_ONCE):
        places = first + tl.arange(0, _TILES_AT_ONCE)
        inside = places < tiles
        pointers = maxima.data + (places // maxima.sharing)[None, :] * variant.row_tile + rows[:, None]
        largest = tl.load(pointers, mask=inside[None, :], other=float("-inf"))
        plain = weigh(score_bound(largest), peaks.shift[:, None], variant)
        excess = positive_part(plain - peaks.mean[:, None]) * peaks.inverse_peak[:, None]
        # Written so that NaN counts. A flat row is plain attention, where every weight does.
        quiet = tl.where(peaks.flat[:, None], plain == 0.0, excess <= bound[:, None])
        active = inside & (tl.max((quiet == 0).to(tl.int32), 0) > 0)
        ones = active.to(tl.int32)
        tl.store(listed + count + tl.cumsum(ones, 0) - ones, start + places * variant.key_tile, mask=active)
        count += tl.sum(ones)
    tl.debug_barrier()  # the list is read by all
    return count
