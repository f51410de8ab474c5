"""What the GPUs that kernels are compiled for have, and what follows for tiles, options of a launch and errors."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import sightline as sl
from sightline.attention import weighting_scalars

pytest.importorskip("triton")

from kernel_usage import Target
from triton.runtime.errors import OutOfResources

from sightline.triton import compat, launch, recurrence_launch, tiles
from sightline.triton.arguments import Options, make_variant

SCALARS = (True, -1, -1, 0.1, 0.0, *weighting_scalars(sl.LSSAR()))


@pytest.fixture
def compiling_for(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes kernels compile for the target that is named."""

    def choose(name: str) -> None:
        monkeypatch.setattr(compat.triton.runtime, "driver", SimpleNamespace(active=Target(name)))

    for module in (compat, tiles):
        monkeypatch.setattr(module, "INTERPRETED", False)
    return choose


@pytest.mark.parametrize(
    ("target", "large", "descriptors", "specialization"),
    [
        ("sm_80", False, False, False),
        ("sm_86", False, False, False),
        ("sm_90", True, True, False),
        ("sm_100", True, True, True),
        ("sm_120", False, True, False),
        ("gfx942", False, False, False),
        ("gfx90a", False, False, False),
    ],
)
def test_what_chips_have(
    target: str,
    large: bool,
    descriptors: bool,
    specialization: bool,
    compiling_for: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compiling_for(target)
    monkeypatch.setattr(compat.triton, "__version__", "3.7.1")
    is_amd = target.startswith("gfx")
    assert compat.compiles_for_amd() is is_amd
    assert compat.has_hopper_memory() is large
    assert compat.has_tensor_descriptors() is descriptors
    assert compat.has_tensor_memory() is specialization
    assert compat.is_small_blackwell() is (target == "sm_120")
    assert compat.has_warp_specialization() is specialization
    assert compat.target_name() == (f"hip-{target}" if is_amd else f"cuda-{target.removeprefix('sm_')}")
    # Only NVIDIA's compiler is told how many registers it may take, and only gfx90a has no tf32.
    assert ("maxnreg" in compat.launch_options(4)) is not is_amd
    assert compat.sixteen_bit_precision() == ("ieee" if target == "gfx90a" else "tf32")
    for name, number in (("3.6.0+git1", (3, 6)), ("4.0+git", (4, 0)), ("3.10.1", (3, 10))):
        monkeypatch.setattr(compat.triton, "__version__", name)
        assert compat.version() == number
        assert compat.has_warp_specialization() is (specialization and number >= (3, 7))


def launched_as(kernel: str, dtype: torch.dtype, width: int) -> tuple[int, int]:
    """(warps, stages) of a kernel of re-weighting."""
    query = torch.empty(1, 2, 100, width, dtype=dtype, device="meta")
    tile = tiles.choose_tile(kernel, make_variant(query, query, Options(*[None] * 9, *SCALARS)))
    return tile.warps, tile.stages


@pytest.mark.parametrize("kernel", ["forward", "decode", "rows", "queries", "keys", "mask"])
def test_on_amd_few_warps_have_all_registers_and_nothing_is_loaded_ahead(
    kernel: str, compiling_for: Callable[[str], None]
) -> None:
    cases = [(kernel, dtype, width) for dtype in (torch.float32, torch.float16) for width in (64, 128, 256)]
    compiling_for("sm_80")
    assert kernel == "rows" or any(launched_as(*case) > (4, 1) for case in cases)
    compiling_for("gfx942")
    assert all(launched_as(*case) <= (4, 1) for case in cases)


@pytest.mark.parametrize("kernel", ["forward", "queries", "keys"])
def test_what_tuning_tries_on_amd_is_launched_as_its_defaults_are(
    kernel: str, compiling_for: Callable[[str], None]
) -> None:
    query = torch.empty(1, 2, 100, 128, dtype=torch.bfloat16, device="meta")
    variant = make_variant(query, query, Options(*[None] * 9, *SCALARS))
    compiling_for("gfx942")
    found = tiles.candidates(kernel, variant)
    assert found
    assert len(set(found)) == len(found)
    default = tiles.choose_tile(kernel, variant)
    assert {(tile.warps, tile.stages, tile.descriptors) for tile in found} == {(default.warps, default.stages, False)}


class TooLarge:
    """A kernel that no device has room for."""

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*arguments: Any, **options: Any) -> None:
            raise OutOfResources(300000, 101376, "shared memory")

        return launch


@pytest.mark.parametrize(
    ("module", "kernel"), [(launch, "measure_split"), (launch, "measure_keys"), (recurrence_launch, "sum_chunks")]
)
def test_a_kernel_that_does_not_fit_the_device_is_refused_with_the_way_out(
    module: Any, kernel: str, compiling_for: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    compiling_for("sm_86")
    monkeypatch.setattr(module, kernel, TooLarge())
    row, keys = torch.zeros(1, 2, 1, 64), torch.zeros(1, 2, 1024, 64)
    nothing = [None] * 9
    calls = {
        "measure_split": lambda: launch.attention(
            row, keys, keys, *nothing, None, None, *SCALARS, False, 0, 0, 0, 0, 0
        ),
        "measure_keys": lambda: launch.attention_backward(
            row, None, row, keys, keys, row, torch.zeros(1, 2, 1, 6), row, *nothing, *SCALARS, False, False, False
        ),
        "sum_chunks": lambda: recurrence_launch.additive_recurrence(
            keys, keys, keys, None, None, None, None, None, True, 1.0, True
        ),
    }
    with pytest.raises(RuntimeError, match=r"does not fit cpu \(cuda-86\).*shared memory.*use backend='reference'"):
        calls[kernel]()
