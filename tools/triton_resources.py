"""Compile the Triton kernels without a GPU, say what they use, and fail where a register spills.

    python tools/triton_resources.py             every case of docs/triton_resources.md, which is written anew
    python tools/triton_resources.py --compare   the same, held against the page; what CI runs
    python tools/triton_resources.py --print --target sm_90 gfx942 --dtype bf16 --width 64 128 --case lssar
    python tools/triton_resources.py --print --section candidates --target sm_100

Every kernel passes the compiler, whatever Triton has in its cache. The page has three sections: `defaults`, the tiles
of untuned calls; `candidates`, the tiles with tensor descriptors that tuning tries; `recurrence`.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import multiprocessing
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import recurrence_resources
import resource_page
import torch
from kernel_usage import (
    DTYPES,
    SHARED_MEMORY,
    Usage,
    bulk_loads,
    compiling_only,
    fresh_cache,
    products,
    registers_and_spills,
    split_loops,
)
from triton.runtime import driver

import sightline as sl
from sightline.attention import weighting_scalars  # the operator takes a weighting as plain numbers
from sightline.triton import launch, tuning
from sightline.triton.tiles import Tile, candidates, choose_tile

WEIGHTINGS = {"softmax": sl.Softmax(), "lssa": sl.LSSA(), "lssar": sl.LSSAR()}
ORDERS = ("causal", "unordered")  # of the recurrence
KERNELS = (
    "attention_forward",
    "prepare_rows",
    "query_gradients",
    "key_gradients",
    "mask_gradient",
    "count_visible_keys",
    "measure_keys",
    "measure_split",
    "attend_split",
    "merge_splits",
)
HEADS, KEY_HEADS, LENGTH = 8, 2, 4096


class Case(NamedTuple):
    """What one call compiles."""

    section: str
    target: str
    name: str  # the weighting; of the recurrence, the order
    dtype: str
    width: int


def _combined(
    section: str, targets: Iterable[str], widths: Iterable[int], dtypes: Iterable[str], names: Iterable[str]
) -> list[Case]:
    order = itertools.product(targets, widths, dtypes, names)
    return [Case(section, target, name, dtype, width) for target, width, dtype, name in order]


EVERY_CASE = [
    *_combined("defaults", ["sm_80", "sm_90"], [64, 128, 256], DTYPES, WEIGHTINGS),
    *_combined("defaults", ["gfx942"], [64, 128, 256], ["bf16", "fp32"], ["softmax", "lssar"]),
    *_combined("defaults", ["gfx942"], [128], ["fp16"], ["lssa"]),
    *_combined("defaults", ["sm_86", "sm_100", "sm_120", "gfx90a"], [128], ["bf16"], ["softmax", "lssar"]),
    # Candidates with descriptors on Hopper, and those of them that are specialised on Blackwell.
    *_combined("candidates", ["sm_90", "sm_100"], [64, 128], ["fp16", "bf16"], WEIGHTINGS),
    *_combined("recurrence", ["sm_80", "sm_90"], [64, 128, 256, 512], DTYPES, ORDERS),
    *_combined("recurrence", ["gfx942", "gfx90a"], [128], ["bf16", "fp32"], ORDERS),
    *_combined("recurrence", ["sm_100", "sm_120"], [128], ["bf16"], ORDERS),
]


def _launch_candidates(kernel: str, variant: Any, launch_tile: Any, describable: Any) -> Tile:
    """In place of tuning.tile_for: launch every candidate that has descriptors; on Blackwell the specialised ones."""
    specialized = driver.active.get_current_target().arch >= 100
    for tile in candidates(kernel, variant):
        if tile.descriptors and tile.specialized == specialized:
            launch_tile(tile)
    return choose_tile(kernel, variant)


def measure(case: Case, kernels: tuple[str, ...] = KERNELS) -> Iterator[Usage]:
    """Compile the kernels of one case, forward with saved rows and backward with the gradient of a broadcast mask."""
    os.environ["SIGHTLINE_TUNING"] = os.devnull  # the defaults are meant, whatever this machine has tuned
    weighting = WEIGHTINGS[case.name]
    of_candidates = case.section == "candidates"
    results: list[tuple[str, Any, Any]] = []

    def wanted(name: str, variant: Any) -> bool:
        # What repairs programs with non-finite results runs on next to no data.
        return name in kernels and variant.descriptors == of_candidates and not variant.safe

    tile_for = tuning.tile_for
    if of_candidates:
        tuning.tile_for = _launch_candidates
    try:
        with compiling_only(case.target, launch, KERNELS, lambda *result: results.append(result), wanted):
            _call_operators(weighting, DTYPES[case.dtype], case.width, kernels)
    finally:
        tuning.tile_for = tile_for
    seen: set[Usage] = set()
    for name, variant, compiled in results:
        loads, loops = bulk_loads(compiled), split_loops(compiled)
        tile = f"{variant.row_tile} x {variant.key_tile}, {compiled.metadata.num_warps} warps"
        tile += ", descriptors" * (loads > 0) + ", specialized" * (loops > 0)
        if name == "attention_forward" and weighting.reweight and not variant.saves:
            name = "attention_forward, inference"
        usage = Usage(
            case.target,
            name,
            case.name,
            case.dtype,
            case.width,
            tile,
            *registers_and_spills(compiled, case.target),
            compiled.metadata.shared,
            products(compiled),
            loads,
            loops,
            effective=variant.descriptors == (loads > 0) and variant.specialized == (loops > 0),
        )
        if usage not in seen:  # forward and backward launch some kernels alike
            seen.add(usage)
            yield usage


def _call_operators(weighting: Any, dtype: torch.dtype, width: int, kernels: tuple[str, ...]) -> None:
    query = torch.empty(1, HEADS, LENGTH, width, dtype=dtype)
    key = torch.empty(1, KEY_HEADS, LENGTH, width, dtype=dtype)
    rows = torch.empty(1, HEADS, LENGTH)
    saved_rows = torch.empty(1, HEADS, LENGTH, 6 if weighting.reweight else 2)
    saved_values = torch.empty_like(query, dtype=torch.float32) if weighting.reweight else torch.empty(0)
    scalars = (True, -1, -1, 0.1, 0.0, *weighting_scalars(weighting))
    nothing = [None] * 9
    if "attention_forward" in kernels:
        # With gradients and, where it takes another tile, without.
        for saves in (True, False) if weighting.reweight else (True,):
            launch.attention(query, key, key, *nothing, None, None, *scalars, saves, 0, 0, 0, 0, 0)
    if {"measure_split", "attend_split", "merge_splits"} & set(kernels):
        launch.attention(query[:, :, :1], key, key, *nothing, None, None, *scalars, False, 0, 0, 0, 0, 0)
    leading = (query, rows, query, key, key, query, saved_rows, saved_values)
    if {"prepare_rows", "query_gradients", "key_gradients"} & set(kernels):
        launch.attention_backward(*leading, *nothing, *scalars, False, False, False)
    if "mask_gradient" in kernels:
        options = [None, None, torch.empty(1, HEADS, 1, LENGTH), *nothing[3:]]
        backward = launch.Backward((*leading, *options, *scalars, True, False, False))
        backward.differentiate_mask(torch.empty(1, HEADS, 1, LENGTH))


def _measure_all(work: tuple[Case, tuple[str, ...]]) -> list[Usage]:
    case, kernels = work
    if case.section == "recurrence":
        return list(recurrence_resources.measure(case.target, case.name, case.dtype, case.width))
    return list(measure(case, kernels))


def measured(cases: Sequence[Case], kernels: tuple[str, ...], jobs: int) -> Iterator[tuple[str, Usage]]:
    """(section, usage) of all cases in their order, by so many processes at a time; prints each."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(fresh_cache())
        each: Any = map
        if jobs > 1:
            each = stack.enter_context(multiprocessing.get_context("spawn").Pool(jobs)).imap
        for case, usages in zip(cases, each(_measure_all, [(case, kernels) for case in cases]), strict=True):
            for usage in usages:
                print("ok   " if usage.fits else "SPILL", usage, flush=True)
                yield case.section, usage


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compare", action="store_true", help="hold the result against the page, which stays as it is")
    parser.add_argument("--print", action="store_true", help="neither write nor compare; for some of the cases")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: one per core)")
    some = parser.add_argument_group("with --print")
    some.add_argument("--section", default="defaults", choices=list(resource_page.SECTIONS))
    some.add_argument("--target", nargs="+", default=["sm_80", "sm_90"], choices=list(SHARED_MEMORY))
    some.add_argument("--case", nargs="+", help="softmax, lssa and lssar; of the recurrence causal and unordered")
    some.add_argument("--dtype", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    some.add_argument("--width", type=int, nargs="+", default=[64, 128, 256])
    some.add_argument("--kernel", nargs="+", default=list(KERNELS), choices=list(KERNELS))
    arguments = parser.parse_args()
    cases = EVERY_CASE
    if arguments.print:
        names = arguments.case or (ORDERS if arguments.section == "recurrence" else WEIGHTINGS)
        lists = (arguments.target, arguments.width, arguments.dtype, names)
        cases = _combined(arguments.section, *lists)
    results = list(measured(cases, tuple(arguments.kernel), arguments.jobs))
    fits = bool(results) and all(usage.fits for _, usage in results)
    if arguments.compare:
        differences = resource_page.differences(results)
        print(*differences, sep="\n")
        return 0 if fits and not differences else 1
    if not arguments.print:
        resource_page.write(results)
    return 0 if fits else 1


if __name__ == "__main__":
    sys.exit(main())
