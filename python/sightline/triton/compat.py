"""Differences between Triton versions, and between Triton's compiler and its interpreter. Nothing else looks at them.

The interpreter stores bfloat16 as integers: it cannot add or multiply them, and it cuts off where hardware rounds. So
the launcher hands it float32 copies of bfloat16 tensors (exact), and what hardware rounds to bfloat16 is rounded
here.
"""

from __future__ import annotations

import contextlib
import contextvars
import os
import re
from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

try:
    INTERPRETED: bool = bool(triton.knobs.runtime.interpret)
except AttributeError:  # before knobs there was the environment variable alone
    INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"

_INTERPRETED = tl.constexpr(INTERPRETED)

_REGISTERS = 65536  # of a multiprocessor


@triton.jit
def round_to_bfloat16(x):
    """fp32 numbers as bfloat16, ready to be an operand of a product."""
    if _INTERPRETED:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        return tl.where(x == x, rounded.to(tl.float32, bitcast=True), x)
    else:
        return x.to(tl.bfloat16)


@triton.jit
def round_to(x, variant: tl.constexpr):
    """fp32 numbers in the dtype of the variant, ready to be an operand of a product."""
    if variant.dtype == "fp16":
        return x.to(tl.float16)
    elif variant.dtype == "bf16":
        return round_to_bfloat16(x)
    else:
        return x


def interpretable(tensor: Tensor) -> Tensor:
    """The tensor itself, or in the interpreter what it can read in its place."""
    return tensor.float() if INTERPRETED and tensor.dtype == torch.bfloat16 else tensor


@contextlib.contextmanager
def launching_on(device: torch.device) -> Iterator[None]:
    """Kernels are launched on the current device, which need not be that of the tensors.

    Raises:
        RuntimeError: a kernel needs more shared memory, registers or threads than the device has.
    """
    try:
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            yield
    except out_of_resources() as error:
        raise RuntimeError(
            f"backend: a Triton kernel of this call does not fit {device} ({target_name()}): {error}; "
            "use backend='reference'"
        ) from error


def multiprocessors(device: torch.device) -> int:
    """How many programs run at once on the device, at least; in the interpreter enough to split the keys of a test."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 32


def version() -> tuple[int, ...]:
    """Major and minor number of Triton's version, which may read "4.0+git1234"."""
    return tuple(int(part) for part in re.findall(r"\d+", triton.__version__)[:2])


def launch_options(warps: int, stages: int = 1, specialized: bool = False) -> dict[str, int]:
    """Triton's options for a launch.

    Left alone, ptxas spills a few registers for one more block per multiprocessor; a limit, even the largest, keeps it
    from that. AMD's compiler has no such option. A specialised kernel has more warps than were asked for, and its
    compiler shares the registers out among them.
    """
    options = {"num_warps": warps, "num_stages": stages}
    if not (compiles_for_amd() or specialized):
        options["maxnreg"] = min(255, _REGISTERS // (32 * warps))
    return options


def compiles_for_amd() -> bool:
    """Whether kernels are compiled for an AMD GPU."""
    return not INTERPRETED and triton.runtime.driver.active.get_current_target().backend == "hip"


def sixteen_bit_precision() -> str:
    """How fp32 tiles are multiplied where ten bits of their mantissas do: in tf32, which of AMD's GPUs gfx942 has."""
    target = None if INTERPRETED else triton.runtime.driver.active.get_current_target()
    return "ieee" if target is not None and target.backend == "hip" and target.arch != "gfx942" else "tf32"


def has_hopper_memory() -> bool:
    """Whether kernels are compiled for an NVIDIA GPU whose blocks may use 227 KiB of shared memory.

    Compute capabilities 9.0 to 11.0; later numbers are small chips again, with 99 KiB.
    """
    target = triton.runtime.driver.active.get_current_target()
    return target.backend == "cuda" and 90 <= target.arch < 120


def has_tensor_memory() -> bool:
    """Whether products gather in tensor memory: data-centre Blackwell, compute capabilities 10.0 to 11.0."""
    target = triton.runtime.driver.active.get_current_target()
    return target.backend == "cuda" and 100 <= target.arch < 120


def is_small_blackwell() -> bool:
    """Whether kernels are compiled for a Blackwell GPU without tensor memory: compute capabilities from 12.0 on."""
    target = triton.runtime.driver.active.get_current_target()
    return target.backend == "cuda" and target.arch >= 120


def has_tensor_descriptors() -> bool:
    """Whether kernels may load by tensor descriptors: NVIDIA from compute capability 9.0 on, and the interpreter."""
    if INTERPRETED:
        return True
    target = triton.runtime.driver.active.get_current_target()
    return target.backend == "cuda" and target.arch >= 90


def has_warp_specialization() -> bool:
    """Whether loops may be split among warps that load, multiply and weigh.

    Where there is tensor memory, from Triton 3.7 on. On Hopper 3.7 refuses the loops of these
    kernels with 4 warps and leaves those with 8 as they are; on 12.0 there is nothing to multiply beside the others.
    """
    if INTERPRETED:
        return False
    return has_tensor_memory() and version() >= (3, 7)


def _scratch_memory(size: int, alignment: int, stream: int | None) -> Tensor:
    return torch.empty(size, dtype=torch.int8, device="cuda")  # from torch: in order with the stream, 512-byte aligned


def with_scratch_memory(launch: Callable[[], object]) -> None:
    """Launch a kernel that makes tensor descriptors, for which Triton asks its allocator for memory.

    The allocator belongs to a context: threads of autograd start without, and a caller may have one of his own.
    """

    def launch_in_context() -> None:
        triton.set_allocator(_scratch_memory)
        launch()

    contextvars.copy_context().run(launch_in_context)


def target_name() -> str:
    """What kernels are compiled for, as in "cuda-90"."""
    target = triton.runtime.driver.active.get_current_target()
    return f"{target.backend}-{target.arch}"


def is_capturing() -> bool:
    """Whether launches go into a CUDA graph, where nothing can be measured."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def out_of_resources() -> type[BaseException]:
    """What Triton raises where a device has too little shared memory, registers or threads for a kernel."""
    from triton.runtime.errors import OutOfResources

    error: type[BaseException] = OutOfResources
    return error


def does_not_fit() -> tuple[type[BaseException], ...]:
    """What Triton raises for a tile that a device has no room for, or that its compiler refuses."""
    from triton.compiler.errors import CompilationError

    errors: tuple[type[BaseException], ...] = (out_of_resources(), CompilationError)
    try:
        from triton.runtime.errors import PTXASError
    except ImportError:
        return errors
    return (*errors, PTXASError)
