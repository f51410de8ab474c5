"""Tiles that were measured on a device, kept on disk.

A first call must not be slow, so nothing is measured unless SIGHTLINE_AUTOTUNE=1 asks for it: then the first call of a
kind of kernel times the default tile and the few of tiles.CANDIDATES on its own arguments and writes the fastest down.
Every process after it reads the file. The kind is what a kernel is compiled for without lengths or strides: a new
length never tunes again. `make gpu-check PART=tune` tunes for the benchmarks that it runs next.

The file is SIGHTLINE_TUNING, or tiles-<target>.json in the cache folder of the user. One that another version of the
kernels or of Triton wrote, or another kind of GPU, is not used.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import triton

from sightline.triton.compat import INTERPRETED, does_not_fit, is_capturing, out_of_resources, target_name
from sightline.triton.problem import Variant
from sightline.triton.tiles import Tile, candidates, choose_tile

Launch = Callable[[Tile], None]
Timer = Callable[[Callable[[], None]], float]
Describable = Callable[[], bool]

_REPETITIONS = 7
# A candidate replaces the default where it is this much faster: less may be noise.
_LEAST_GAIN = 1.02


def kind(kernel: str, variant: Variant) -> str:
    """The name of a kind of kernel in the file.

    Sides of a window, masks, dropout and the like share the tile of the plain call.
    """
    options = ("reweight", "saves", "normalize_qk", "causal")
    marks = [name for name in options if getattr(variant, name)]
    widths = f"{variant.block_width}x{variant.block_value_width}"
    return "-".join([kernel, variant.function, *marks, variant.dtype, widths])


@functools.cache
def kernels_fingerprint() -> str:
    """A hash of the kernels' sources and of Triton's version."""
    digest = hashlib.sha256(triton.__version__.encode())
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def tuning_file() -> Path:
    """Where the tiles of the current device stand."""
    named = os.environ.get("SIGHTLINE_TUNING")
    if named:
        return Path(named)
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # a user without a home
        cache = Path(tempfile.gettempdir())
    return cache / "sightline" / f"tiles-{target_name()}.json"


class TunedTiles:
    """The tiles of one file, read once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tiles: dict[str, Tile] = self._read()

    def _read(self) -> dict[str, Tile]:
        try:
            content = json.loads(self.path.read_text())
            if content["kernels"] != kernels_fingerprint() or content["target"] != target_name():
                return {}
            return {name: _tile_of(numbers) for name, numbers in content["tiles"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}

    def keep(self, name: str, tile: Tile) -> None:
        """Add a tile, to the file too; where that cannot be written this process alone remembers it."""
        self.tiles = {**self._read(), **self.tiles, name: tile}
        if self.path.exists() and not self.path.is_file():
            return  # /dev/null, of which root would make a file
        written = {"kernels": kernels_fingerprint(), "target": target_name()}
        content = {**written, "tiles": dict(sorted(self.tiles.items()))}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=self.path.parent, suffix=".json", delete=False) as file:
                json.dump(content, file, indent=1)
            Path(file.name).replace(self.path)  # in one move: other processes tune too
        except OSError:
            return


def _tile_of(numbers: list[int]) -> Tile:
    """A tile as it stands in the file; what loads by pointers needs no more than four numbers."""
    rows, keys, warps, stages = map(int, numbers[:4])
    return Tile(rows, keys, warps, stages, *map(bool, numbers[4:]))


@functools.cache
def _tuned_tiles(path: Path, target: str) -> TunedTiles:
    """The tiles of a file for one kind of GPU: a process may have two."""
    return TunedTiles(path)


def seconds_on_device(call: Callable[[], None]) -> float:
    """The median time of a call by CUDA events, after one that compiles."""
    call()
    times = []
    for _ in range(_REPETITIONS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def fastest_tile(default: Tile, others: tuple[Tile, ...], launch: Launch, timer: Timer) -> Tile:
    """The fastest of the tiles that fit; the default unless another clearly wins."""
    best, least = default, timer(lambda: launch(default)) / _LEAST_GAIN
    for tile in others:
        try:
            seconds = timer(functools.partial(launch, tile))
        except does_not_fit():
            continue
        except RuntimeError:
            # All that Triton says of a loop that its passes cannot specialise.
            if not tile.specialized:
                raise
            continue
        if seconds < least:
            best, least = tile, seconds
    return best


def tile_for(
    kernel: str, variant: Variant, launch: Launch, describable: Describable, timer: Timer = seconds_on_device
) -> Tile:
    """The tile of a kernel: as measured on this device, or the default.

    `launch` runs the kernel with a tile and may do so any number of times. It is called here only where
    SIGHTLINE_AUTOTUNE=1 asks to measure a kind that is not in the file. `describable` says whether the tensors suit
    tensor descriptors: to those that do not, tiles with descriptors are neither given nor measured on them.
    """
    default = choose_tile(kernel, variant)
    if INTERPRETED:
        return default
    others = tuple(tile for tile in candidates(kernel, variant) if tile != default)
    if not others:
        return default
    tuned = _tuned_tiles(tuning_file(), target_name())
    name = kind(kernel, variant)
    if name in tuned.tiles:
        tile = tuned.tiles[name]
        return tile if not tile.descriptors or describable() else default
    if os.environ.get("SIGHTLINE_AUTOTUNE") != "1" or is_capturing():
        return default
    if not describable():
        others = tuple(tile for tile in others if not tile.descriptors)
    best = fastest_tile(default, others, launch, timer)
    tuned.keep(name, best)
    return best


def launch_tuned(kernel: str, variant: Variant, launch: Launch, describable: Describable) -> None:
    """Launch a kernel with the tile that `tile_for` gives; with the default where that does not fit.

    What a kind shares its tile with, a mask above all, may need more memory than the call that was measured.

    Raises:
        RuntimeError: the device has no room for the default either.
    """
    tile = tile_for(kernel, variant, launch, describable)
    default = choose_tile(kernel, variant)
    if tile != default:
        try:
            launch(tile)
        except does_not_fit():
            pass
        else:
            return
    try:
        launch(default)
    except out_of_resources() as error:
        raise RuntimeError(
            f"backend: the Triton kernel {kind(kernel, variant)!r} does not fit this device ({target_name()}) with its "
            f"tile of {default}: {error}; use backend='reference', or SIGHTLINE_AUTOTUNE=1 to find a tile that fits"
        ) from error
