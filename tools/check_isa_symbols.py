"""Checks that code compiled for a wide instruction set stays behind the dispatcher.

    python tools/check_isa_symbols.py build/cmake

Every kernel file is compiled once per instruction set. Of an inline function that several objects contain the linker
keeps one copy, whichever it meets first: were that the AVX-512 copy, a machine without AVX-512 would die in code that
looks generic. So a weak function in such an object must carry the instruction set's name in its own. For the same
reason these objects must not have static initialisers: those run when the library is loaded, on every machine.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

BASELINE = "generic"


def violations(listing: str, isa: str) -> list[str]:
    """The offending symbols of one object file, given what `nm` prints for it and its instruction set."""
    namespace = f"{len(isa)}{isa}"
    found = []
    for line in listing.splitlines():
        *_, kind, symbol = line.split()
        if kind == "W" and namespace not in symbol:
            found.append(f"weak function outside namespace {isa}: {symbol}")
        elif re.match(r"_GLOBAL__(sub_)?I_|__cxx_global_var_init", symbol):
            found.append(f"static initialiser: {symbol}")
    return found


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print("usage: check_isa_symbols.py BUILD_FOLDER", file=sys.stderr)
        return 2
    objects = sorted(Path(arguments[0]).glob("CMakeFiles/sightline_*.dir/csrc/cpu/*.o"))
    isa_of = {path: path.parts[-4].removeprefix("sightline_").removesuffix(".dir") for path in objects}
    wide = [path for path in objects if isa_of[path] not in (BASELINE, "dispatch")]
    if not objects:
        print(f"{arguments[0]}: no kernel objects; build first", file=sys.stderr)
        return 2
    failed = 0
    for path in wide:
        listing = subprocess.run(["nm", "--defined-only", path], check=True, capture_output=True, text=True).stdout
        for violation in violations(listing, isa_of[path]):
            print(f"{isa_of[path]}/{path.name}: {violation}", file=sys.stderr)
            failed += 1
    print(f"instruction sets: {len(wide)} objects checked, {failed} symbols leak")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
