"""What this machine and this installation are: versions, device, instruction set, available memory."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

REPORTED_PACKAGES = ("sightline", "torch", "numpy", "triton", "transformers")


def installed_version(distribution: str) -> str | None:
    """Version of an installed distribution from its metadata, without importing it; None when it is not installed.

    Example:
        >>> installed_version("no-such-distribution") is None
        True
    """
    try:
        return version(distribution)
    except PackageNotFoundError:
        if distribution == "sightline":  # run from a source tree
            import sightline

            return str(sightline.__version__)
        return None


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that matter here, None for those not installed."""
    return {"python": platform.python_version()} | {name: installed_version(name) for name in REPORTED_PACKAGES}


def processor_name() -> str:
    """The CPU's model name as the operating system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def instruction_sets() -> dict[str, Any]:
    """The instruction set the native kernels use and those this CPU could use."""
    from sightline import ops

    return {"chosen": ops.isa_name(), "available": ops.available_isas()}


def describe_device(device: torch.device) -> dict[str, Any]:
    """Name, kind, threads and memory (bytes) of the device a measurement runs on."""
    import torch

    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return {
            "kind": "cuda",
            "name": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "memory_bytes": properties.total_memory,
            "threads": torch.get_num_threads(),
        }
    return {
        "kind": "cpu",
        "name": processor_name(),
        "machine": platform.machine(),
        "memory_bytes": _meminfo("MemTotal"),
        "threads": torch.get_num_threads(),
    }


def available_memory(device: torch.device) -> int | None:
    """Bytes that can be allocated on the device now: free and reclaimable, within the control group's limit.

    None where the operating system does not say.
    """
    if device.type == "cuda":
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    found = [size for size in (_meminfo("MemAvailable"), _control_group_headroom()) if size is not None]
    return min(found) if found else None


def _meminfo(field: str) -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    return None


def _control_group_headroom() -> int | None:
    for limit_file, usage_file in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            limit, usage = Path(limit_file).read_text().strip(), Path(usage_file).read_text().strip()
        except OSError:
            continue
        if limit != "max":
            return max(0, int(limit) - int(usage))
    return None
