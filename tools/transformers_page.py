"""Writes the table of docs/transformers.md from the tests: which family has a test in which column.

    python tools/transformers_page.py           write the page
    python tools/transformers_page.py --check   say whether it is up to date, changing nothing

The families and what they are tested for are read from the marks of the test functions, never typed.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "transformers.md"
TESTS = str(ROOT / "tests")
BEGIN = "<!-- Written by tools/transformers_page.py from the tests. -->\n"
END = "<!-- end -->\n"

# The tests that a family must have, all of them, for a mark in the column.
COLUMNS = {
    "plain": ["test_exactness.test_unpadded"],
    "padded": ["test_exactness.test_padded"],
    "own mask": ["test_exactness.test_mask_of_the_user"],
    "packed": ["test_exactness.test_packed_offsets"],
    "dynamic cache": ["test_generation.test_dynamic_cache"],
    "static cache": ["test_generation.test_static_cache"],
    "chunked prefill": ["test_generation.test_chunked_prefill"],
    "beam search": ["test_generation.test_beam_search"],
    "assisted": ["test_generation.test_assisted_decoding"],
    "training": ["test_training.test_gradients", "test_training.test_dropout"],
    "compiled": ["test_compile.test_forward"],
    "LSSA, LSSAR": ["test_weightings.test_as_the_formula"],
    "saved": ["test_persistence.test_weighting_is_saved_and_reloaded"],
}


def tested_families(test: str) -> set[str]:
    """The names of the families that a test ("module.function") is parametrised with."""
    module, function = test.split(".")
    marks = getattr(importlib.import_module(f"hf.{module}"), function).pytestmark
    return {
        family.name
        for mark in marks
        if mark.name == "parametrize" and mark.args[0] == "family"
        for family in mark.args[1]
    }


def table(families: list[Any]) -> str:
    """One row per family, one column per group of tests."""
    columns = {title: set.intersection(*map(tested_families, tests)) for title, tests in COLUMNS.items()}
    lines = [f"| family | what is special | {' | '.join(columns)} |", "|---" * (len(columns) + 2) + "|"]
    for family in families:
        cells = ["yes" if family.name in names else "·" for names in columns.values()]
        lines.append(f"| {family.title} | {family.special} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def rendered(page: str) -> str:
    """The page with a fresh table between its two marks."""
    if TESTS not in sys.path:
        sys.path.insert(0, TESTS)
    families = importlib.import_module("hf.families").FAMILIES
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table(families)}\n{END}{after}"


def main() -> int:
    """Write or check the page; 1 where a check finds it out of date."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--check", action="store_true", help="change nothing, exit with 1 where the page is out of date"
    )
    check = parser.parse_args().check
    written = PAGE.read_text()
    fresh = rendered(written)
    if check:
        if written != fresh:
            print(f"{PAGE.relative_to(ROOT)} is out of date: run python tools/transformers_page.py", file=sys.stderr)
        return int(written != fresh)
    PAGE.write_text(fresh)
    return 0


if __name__ == "__main__":
    sys.exit(main())
