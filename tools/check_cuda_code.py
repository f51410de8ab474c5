"""Checks the machine code inside libsightline_cuda.so: which GPUs it is for, and that no kernel spills registers.

    python tools/check_cuda_code.py python/sightline/_lib/libsightline_cuda.so

A kernel that uses a stack frame keeps in memory what should be in registers: spilled values, or an array that is
indexed by a variable. cuobjdump is taken from CUDA, else from the triton package.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

REQUIRED = (80, 90)


@dataclass(frozen=True)
class Kernel:
    """What one kernel uses on one GPU family (compute capability times ten): registers, bytes of stack and memory."""

    architecture: int
    name: str
    registers: int
    stack: int
    local: int


def find_cuobjdump() -> str | None:
    """The program, or None where neither CUDA nor triton is installed."""
    spec = importlib.util.find_spec("triton")
    folders = spec.submodule_search_locations or [] if spec else []
    packaged = [str(Path(folder, "backends", "nvidia", "bin")) for folder in folders]
    places = [os.environ.get("PATH", os.defpath), "/usr/local/cuda/bin", *packaged]
    return shutil.which("cuobjdump", path=os.pathsep.join(places))


def parse_resource_usage(listing: str) -> list[Kernel]:
    """The kernels in what `cuobjdump --dump-resource-usage` prints."""
    kernels = []
    architecture, name = 0, ""
    for line in listing.splitlines():
        if found := re.match(r"arch = sm_(\d+)", line.strip()):
            architecture = int(found[1])
        elif found := re.match(r"Function (\S+):", line.strip()):
            name = found[1]
        elif found := re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", line):
            kernels.append(Kernel(architecture, name, *map(int, found.groups())))
    return kernels


def violations(kernels: list[Kernel]) -> list[str]:
    """What is wrong with these kernels."""
    built = {kernel.architecture for kernel in kernels}
    found = [f"no machine code for sm_{wanted}" for wanted in REQUIRED if wanted not in built]
    found += [
        f"sm_{kernel.architecture}: {kernel.name} has {kernel.stack + kernel.local} bytes of registers in memory"
        for kernel in kernels
        if kernel.stack + kernel.local > 0
    ]
    names = {
        architecture: {kernel.name for kernel in kernels if kernel.architecture == architecture}
        for architecture in built
    }
    if len({frozenset(group) for group in names.values()}) > 1:
        found.append("not every kernel was built for every GPU family")
    return found


def main(libraries: list[str]) -> int:
    if len(libraries) != 1:
        print("usage: check_cuda_code.py LIBRARY", file=sys.stderr)
        return 2
    cuobjdump = find_cuobjdump()
    if cuobjdump is None:
        print("cuobjdump is missing: install CUDA or triton", file=sys.stderr)
        return 2
    command = [cuobjdump, "--dump-resource-usage", libraries[0]]
    kernels = parse_resource_usage(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    found = violations(kernels)
    for violation in found:
        print(f"{libraries[0]}: {violation}", file=sys.stderr)
    families = ", ".join(f"sm_{number}" for number in sorted({kernel.architecture for kernel in kernels}))
    most = max((kernel.registers for kernel in kernels), default=0)
    print(f"CUDA code: {len(kernels)} kernels for {families or 'no GPU'}, at most {most} registers")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
