"""Checks that a native library keeps to torch's stable ABI and to what the wheel's tag promises.

    python tools/check_stable_abi.py python/sightline/_lib/libsightline.so

It may use torch through the C shims only (`aoti_torch_*`, `torch_*`), may use no symbol of Python, may need no library
but the ones named below, and may carry no search path of the machine that built it.
"""

from __future__ import annotations

import re
import subprocess
import sys

# libgomp is not among them: threads come from torch's own pool, and a second OpenMP runtime oversubscribes the cores.
# Nor is libcudart: the CUDA runtime is linked in, so that the library fits a torch of any CUDA version.
ALLOWED_LIBRARIES = re.compile(
    r"(libtorch_cpu|libtorch_cuda|libtorch|libstdc\+\+|libgcc_s|libc|libm|libdl|libpthread|librt|ld-linux[-\w]*)\.so(\.\d+)?"
)
PYTHON_SYMBOL = re.compile(r"_?Py[A-Z_]")
TORCH_CPP = re.compile(r"\b(c10|at|torch|caffe2)::")


def output_of(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def violations(undefined: list[str], dynamic_section: str) -> list[str]:
    """What is wrong, given the demangled undefined symbols and what `readelf -d` prints."""
    found = [f"symbol of Python: {symbol}" for symbol in undefined if PYTHON_SYMBOL.match(symbol)]
    found += [f"C++ symbol of torch: {symbol}" for symbol in undefined if TORCH_CPP.search(symbol)]
    if not any(symbol.startswith(("aoti_torch_", "torch_")) for symbol in undefined):
        found.append("no symbol of torch's stable ABI: this is not an operator library")
    for library in re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic_section):
        if not ALLOWED_LIBRARIES.fullmatch(library):
            found.append(f"needs {library}")
    found += [f"search path: {path}" for path in re.findall(r"\((?:RPATH|RUNPATH)\).*\[(.*)\]", dynamic_section)]
    return found


def main(libraries: list[str]) -> int:
    if not libraries:
        print("usage: check_stable_abi.py LIBRARY...", file=sys.stderr)
        return 2
    failed = 0
    for library in libraries:
        listing = output_of("nm", "--dynamic", "--undefined-only", "--demangle", library)
        undefined = [line.strip().split(maxsplit=1)[1] for line in listing.splitlines()]
        for violation in violations(undefined, output_of("readelf", "--dynamic", "--wide", library)):
            print(f"{library}: {violation}", file=sys.stderr)
            failed += 1
        print(f"stable ABI: {len(undefined)} undefined symbols of {library} checked")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
