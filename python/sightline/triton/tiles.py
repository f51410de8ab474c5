"""The one table of tile sizes: rows and keys of a tile, warps, and stages of the software pipeline, per kernel.

docs/triton_resources.md has the registers and shared memory of each entry, which were chosen so that nothing spills and
everything fits where a GPU has 99 KiB of shared memory (AMD's have 64). What holds more than that is for those that
have it. CANDIDATES are the few others that tuning.py tries on a device; which of them load by tensor descriptors or are
specialised is a matter of what the device has. No default does: nothing of it was measured yet.
"""

from __future__ import annotations

from typing import NamedTuple

from sightline.triton.compat import (
    INTERPRETED,
    compiles_for_amd,
    has_hopper_memory,
    has_tensor_descriptors,
    has_tensor_memory,
    has_warp_specialization,
    is_small_blackwell,
)
from sightline.triton.problem import Variant


class Tile(NamedTuple):
    """How a kernel is cut and launched."""

    rows: int
    keys: int
    warps: int
    stages: int
    descriptors: bool = False  # what the kernel streams by tensor descriptors, where the tensors allow it
    specialized: bool = False  # with descriptors: warps of their own for loads, products and weights

    def __str__(self) -> str:
        loads = "".join(f", {name}" for name in ("descriptors", "specialized") if getattr(self, name))
        return f"{self.rows} x {self.keys}, {self.warps} warps, {self.stages} stages{loads}"


# By kernel, operand ("half": fp16 and bf16) and the wider of the two head widths, rounded up to a power of two. A name
# with "sharp" is for re-weighting, which holds more of a tile at once, and "saving" for its forward with gradients.
_TILES: dict[tuple[str, str, int], Tile] = {
    ("forward", "half", 64): Tile(128, 64, 8, 3),
    ("forward", "half", 128): Tile(64, 64, 8, 2),
    ("forward", "half", 256): Tile(64, 32, 8, 2),
    ("sharp forward", "half", 64): Tile(64, 64, 8, 2),
    ("sharp forward", "half", 128): Tile(64, 32, 8, 3),
    ("sharp forward", "half", 256): Tile(32, 32, 8, 2),
    ("saving forward", "half", 64): Tile(64, 32, 8, 2),
    ("saving forward", "half", 128): Tile(32, 64, 8, 2),
    ("saving forward", "half", 256): Tile(16, 32, 8, 2),
    ("decode", "half", 64): Tile(16, 64, 4, 3),
    ("decode", "half", 128): Tile(16, 64, 4, 3),
    ("decode", "half", 256): Tile(16, 32, 4, 3),
    ("queries", "half", 64): Tile(64, 32, 4, 2),
    ("queries", "half", 128): Tile(64, 32, 8, 2),
    ("queries", "half", 256): Tile(16, 32, 8, 1),
    ("sharp queries", "half", 64): Tile(64, 32, 8, 2),
    ("sharp queries", "half", 128): Tile(32, 32, 4, 2),
    ("sharp queries", "half", 256): Tile(16, 32, 8, 1),
    ("keys", "half", 64): Tile(32, 32, 4, 2),
    ("keys", "half", 128): Tile(16, 64, 8, 2),
    ("keys", "half", 256): Tile(16, 32, 8, 1),
    ("sharp keys", "half", 64): Tile(32, 32, 8, 2),
    ("sharp keys", "half", 128): Tile(32, 32, 8, 2),
    ("sharp keys", "half", 256): Tile(16, 32, 8, 1),
    ("mask", "half", 64): Tile(64, 32, 8, 1),
    ("mask", "half", 128): Tile(32, 64, 8, 1),
    ("mask", "half", 256): Tile(16, 32, 8, 1),
    ("forward", "fp32", 64): Tile(32, 32, 4, 2),
    ("forward", "fp32", 128): Tile(32, 32, 8, 2),
    ("forward", "fp32", 256): Tile(16, 32, 8, 1),
    ("sharp forward", "fp32", 64): Tile(32, 32, 8, 2),
    ("sharp forward", "fp32", 128): Tile(16, 32, 8, 2),
    ("sharp forward", "fp32", 256): Tile(16, 16, 8, 1),
    ("decode", "fp32", 64): Tile(16, 32, 4, 2),
    ("decode", "fp32", 128): Tile(16, 16, 8, 2),
    ("decode", "fp32", 256): Tile(16, 16, 8, 2),
    ("queries", "fp32", 64): Tile(32, 32, 8, 1),
    ("queries", "fp32", 128): Tile(16, 16, 8, 2),
    ("queries", "fp32", 256): Tile(16, 16, 16, 1),
    ("keys", "fp32", 64): Tile(32, 32, 8, 1),
    ("keys", "fp32", 128): Tile(32, 32, 8, 1),
    ("keys", "fp32", 256): Tile(16, 16, 8, 1),
    ("mask", "fp32", 64): Tile(32, 32, 8, 1),
    ("mask", "fp32", 128): Tile(16, 32, 8, 1),
    ("mask", "fp32", 256): Tile(16, 16, 4, 1),
    ("sharp queries", "fp32", 256): Tile(16, 16, 8, 1),
}
# What Hopper and the large chips after it hold more of. Their products of whole warp groups (wgmma) want 64 rows for
# four warps and 128 for eight, which compute the scores of 64 twice; the gradient of the keys as many keys.
_HOPPER_TILES: dict[tuple[str, str, int], Tile] = {
    ("forward", "half", 128): Tile(128, 64, 8, 3),
    ("sharp forward", "half", 64): Tile(128, 64, 8, 3),
    ("sharp forward", "half", 128): Tile(128, 64, 8, 2),
    ("saving forward", "half", 64): Tile(128, 32, 8, 2),
    ("saving forward", "half", 128): Tile(64, 32, 8, 2),
    ("queries", "half", 64): Tile(128, 64, 8, 2),
    ("queries", "half", 128): Tile(128, 32, 8, 2),
    ("sharp queries", "half", 64): Tile(128, 32, 8, 2),
    ("sharp queries", "half", 128): Tile(128, 32, 8, 2),
    ("keys", "half", 64): Tile(32, 128, 8, 2),
    ("sharp keys", "half", 64): Tile(16, 128, 8, 2),
    ("sharp queries", "fp32", 256): Tile(16, 16, 16, 2),
}
# What spills there where products gather in tensor memory, from which all of a tile's sums are loaded at once.
_BLACKWELL_TILES: dict[tuple[str, str, int], Tile] = {
    ("keys", "half", 64): Tile(16, 128, 8, 2),
    ("sharp keys", "half", 64): Tile(32, 32, 8, 2),
    ("keys", "half", 128): Tile(32, 32, 8, 2),
}
# What spills on the small chips of that generation, which take the tiles of Ampere.
_SMALL_BLACKWELL_TILES: dict[tuple[str, str, int], Tile] = {
    ("saving forward", "half", 128): Tile(32, 32, 8, 2),
}
# AMD's GPUs take the tiles of Ampere. A warp is 64 threads there, and four of them, one per unit of a processor, may
# use all 512 registers of a thread, eight only 256, of which re-weighting spills. What stages ask to be loaded ahead of
# a loop is kept in registers too: with two the gradients take up to half as many more. Compiled, and never run.
_AMD_WARPS, _AMD_STAGES = 4, 1
# The kernel over rows holds whole rows and no tile of keys.
_ROWS = {
    ("half", 64): Tile(64, 16, 4, 1),
    ("half", 128): Tile(32, 16, 4, 1),
    ("half", 256): Tile(16, 16, 4, 1),
    ("fp32", 64): Tile(32, 16, 4, 1),
    ("fp32", 128): Tile(16, 16, 4, 1),
    ("fp32", 256): Tile(16, 16, 4, 1),
}
# Small enough that the sizes of tests span several tiles; the interpreter's time goes by operations, not by numbers.
_INTERPRETED = Tile(32, 64, 4, 1)
# As wide as a tile of keys: NumPy adds up a product in an order that depends on its size, and <do, o> must be added up
# as <do, v> is.
_INTERPRETED_ROWS = Tile(64, 64, 4, 1)


_FORWARD_CANDIDATES = (
    Tile(128, 64, 4, 3),
    Tile(128, 128, 8, 2),
    Tile(64, 64, 4, 3),
    Tile(128, 32, 8, 3),
    Tile(128, 64, 8, 3, descriptors=True),
    Tile(128, 128, 8, 2, descriptors=True),
    Tile(64, 64, 4, 3, descriptors=True),
)
# What else a kernel may be cut into, tried in this order by tuning.py; for one width, or for any.
CANDIDATES: dict[tuple[str, str] | tuple[str, str, int], tuple[Tile, ...]] = {
    ("forward", "half"): (*_FORWARD_CANDIDATES, Tile(64, 64, 8, 2, descriptors=True, specialized=True)),
    ("softplus forward", "half"): (
        *_FORWARD_CANDIDATES,
        Tile(128, 64, 8, 2, descriptors=True, specialized=True),
    ),
    ("sharp forward", "half"): (
        Tile(64, 64, 4, 3),
        Tile(128, 64, 8, 2),
        Tile(64, 128, 8, 2),
        Tile(64, 32, 4, 2),
        Tile(64, 64, 4, 2, descriptors=True),
        Tile(128, 64, 8, 2, descriptors=True),
        Tile(128, 64, 8, 2, descriptors=True, specialized=True),
    ),
    ("saving forward", "half"): (
        Tile(64, 64, 8, 2),
        Tile(32, 64, 4, 2),
        Tile(128, 32, 8, 2),
        Tile(32, 64, 4, 2, descriptors=True),
    ),
    ("queries", "half"): (
        Tile(64, 64, 4, 2),
        Tile(128, 64, 8, 2),
        Tile(64, 64, 8, 2),
        Tile(64, 32, 4, 3),
        Tile(64, 32, 8, 2, descriptors=True),
    ),
    ("keys", "half", 64): (
        Tile(32, 32, 4, 2),
        Tile(32, 64, 4, 2),
        Tile(16, 64, 4, 2),
        Tile(16, 128, 8, 2),
        Tile(16, 128, 8, 2, descriptors=True),
        Tile(16, 64, 4, 2, descriptors=True),
    ),
    ("keys", "half"): (
        Tile(32, 32, 8, 2),
        Tile(32, 64, 8, 2),
        Tile(16, 64, 8, 2),
        Tile(16, 128, 8, 2),
        Tile(32, 32, 8, 2, descriptors=True),
    ),
    ("forward", "fp32"): (Tile(64, 32, 8, 2), Tile(64, 64, 8, 1)),
    ("queries", "fp32"): (Tile(32, 32, 4, 1), Tile(64, 32, 8, 1)),
    ("keys", "fp32"): (Tile(16, 32, 4, 1), Tile(32, 64, 8, 1)),
}


def _on_amd(tile: Tile) -> Tile:
    return tile._replace(warps=_AMD_WARPS, stages=_AMD_STAGES)


def operand_of(variant: Variant) -> str:
    """The kind of operand that tiles are chosen by."""
    return "fp32" if variant.dtype == "fp32" else "half"


def _width_of(variant: Variant) -> int:
    """The wider of the two head widths as the tables know it."""
    return max(64, variant.block_width, variant.block_value_width)


def names_of(kernel: str, variant: Variant) -> tuple[str, ...]:
    """The names under which the tables know a kernel, the most special first."""
    if not variant.reweight:
        return (f"{variant.function} {kernel}", kernel)
    saving = (f"saving {kernel}",) if variant.saves else ()
    return (*saving, f"sharp {kernel}", kernel)


def candidates(kernel: str, variant: Variant) -> tuple[Tile, ...]:
    """The other tiles worth trying on this device; none for kernels that are not tuned."""
    operand, width = operand_of(variant), _width_of(variant)
    keys = (key for name in names_of(kernel, variant) for key in ((name, operand, width), (name, operand)))
    tiles: tuple[Tile, ...] = next((CANDIDATES[key] for key in keys if key in CANDIDATES), ())
    if compiles_for_amd():
        return tuple(dict.fromkeys(_on_amd(tile) for tile in tiles if not tile.descriptors))
    if not (tiles and has_tensor_descriptors()):
        return tuple(tile for tile in tiles if not tile.descriptors)
    specializes = can_be_specialized(variant) and has_warp_specialization()
    return tuple(tile for tile in tiles if specializes or not tile.specialized)


def can_be_specialized(variant: Variant) -> bool:
    """Whether Triton's compiler splits the loops of a forward kernel among warps without spilling.

    What is compiled in tests: plain calls of models' widths, causal or not. With softmax wider than 64, and
    with re-weighting, warps spill a few registers. The running exponent of softplus in fp16 is too much for the
    compiler: it spills by hundreds of bytes, or does not come to an end.
    """
    widths = {variant.block_width, variant.block_value_width, variant.head_width, variant.value_width}
    options = (variant.masked_everywhere, variant.documents, variant.window_left, variant.softcap, variant.dropout)
    if len(widths) != 1 or any(options):
        return False
    if variant.function == "softplus":
        if variant.reweight:
            return variant.dtype == "bf16" and widths == {64} and variant.whole_power > 0
        return variant.dtype == "bf16" and widths <= {64, 128}
    return variant.function == "softmax" and variant.dtype != "fp32" and widths == {64} and not variant.reweight


def choose_tile(kernel: str, variant: Variant) -> Tile:
    """The tile of a kernel: "forward", "decode", "rows", "queries", "keys" or "mask"."""
    if INTERPRETED:
        return _INTERPRETED_ROWS if kernel == "rows" else _INTERPRETED
    width = _width_of(variant)
    if kernel == "rows":
        return _ROWS[operand_of(variant), width]
    keys = [(name, operand_of(variant), width) for name in names_of(kernel, variant)]
    key = next(key for key in keys if key in _TILES)
    if compiles_for_amd():
        return _on_amd(_TILES[key])
    tile = _HOPPER_TILES.get(key, _TILES[key]) if has_hopper_memory() else _TILES[key]
    if is_small_blackwell():
        return _SMALL_BLACKWELL_TILES.get(key, tile)
    return _BLACKWELL_TILES.get(key, tile) if has_tensor_memory() else tile
