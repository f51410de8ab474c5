"""Checks the tag and the contents of a wheel: one binary for every Python, and nothing that only development needs.

python tools/check_wheel.py dist/sightline-*.whl
"""

from __future__ import annotations

import re
import sys
import zipfile
from pathlib import Path

TAG = re.compile(r"sightline-[^-]+-py3-none-(linux|manylinux_\d+_\d+)_\w+\.whl")
REQUIRED = (
    "sightline/__init__.py",
    "sightline/cli/__init__.py",
    "sightline/py.typed",
    "sightline/_lib/libsightline.so",
)
ALLOWED = re.compile(r"sightline/(.*\.py|py\.typed|_lib/libsightline(_\w+)?\.so)|sightline-[^/]*\.dist-info/.*")


def violations(file_name: str, members: list[str]) -> list[str]:
    """What is wrong with a wheel of this name and these members."""
    found = [] if TAG.fullmatch(file_name) else ["the tag is not py3-none-<platform>"]
    found += [f"{name} is missing" for name in REQUIRED if name not in members]
    found += [f"{name} does not belong in the wheel" for name in members if not ALLOWED.fullmatch(name)]
    return found


def main(wheels: list[str]) -> int:
    if len(wheels) != 1:
        print(f"expected exactly one wheel, got {wheels}", file=sys.stderr)
        return 2
    wheel = Path(wheels[0])
    members = zipfile.ZipFile(wheel).namelist()
    found = violations(wheel.name, members)
    for violation in found:
        print(f"{wheel.name}: {violation}", file=sys.stderr)
    print(f"wheel: {wheel.name}, {len(members)} files, {wheel.stat().st_size / 2**20:.2f} MiB")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
