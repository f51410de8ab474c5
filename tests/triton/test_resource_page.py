"""docs/triton_resources.md has every case, and the step of CI that compiles them all notices what has changed."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("triton")

import resource_page
import triton
import triton_resources
from kernel_usage import SHARED_MEMORY, CompileOnly, Usage, registers_and_spills
from triton.backends.nvidia import compiler

PLAIN = Usage("sm_80", "attention_forward", "softmax", "bf16", 64, "128 x 64, 8 warps", 200, 0, 49152, "mma")
LOADING = replace(PLAIN, target="sm_90", tile="64 x 64, 8 warps, descriptors", bulk_loads=4)
RECURRENT = replace(PLAIN, kernel="scan_chunks", case="causal", tile="64 rows, 64 x 64, 8 warps", products="")
RESULTS = [("defaults", PLAIN), ("candidates", LOADING), ("recurrence", RECURRENT)]


def test_a_page_agrees_with_the_results_it_was_written_from() -> None:
    assert resource_page.differences(RESULTS, resource_page.text(RESULTS)) == []


@pytest.mark.parametrize("place", range(len(RESULTS)))
def test_a_spill_other_products_another_tile_and_a_missing_line_are_found(place: int) -> None:
    page = resource_page.text(RESULTS)
    section, usage = RESULTS[place]

    def differences(*changed: tuple[str, Usage]) -> list[str]:
        return resource_page.differences([*RESULTS[:place], *changed, *RESULTS[place + 1 :]], page)

    (spilled,) = differences((section, replace(usage, spilled=8)))
    assert spilled.startswith("spilled bytes, 0 on the page and 8 now:")
    assert usage.kernel in spilled
    (slower,) = differences((section, replace(usage, products="fma")))
    assert slower.startswith(f"products, {usage.products or 'none'} on the page and fma now:")
    retiled = differences((section, replace(usage, tile="32 x 32, 4 warps")))
    assert [line.partition(":")[0] for line in retiled] == ["not on the page", "on the page, and not compiled"]
    assert [line.partition(":")[0] for line in differences()] == ["on the page, and not compiled"]
    assert differences((section, replace(usage, registers=usage.registers + 1))) == []


@pytest.mark.parametrize(
    ("changes", "status"),
    [({}, 0), ({"spilled": 4}, 1), ({"shared": 200000}, 1), ({"effective": False}, 1), ({"tile": "1 x 1, 4 warps"}, 1)],
)
def test_the_step_of_ci_fails_where_it_should(
    changes: dict[str, object], status: int, monkeypatch: pytest.MonkeyPatch, tmp_path: object
) -> None:
    page = tmp_path / "page.md"
    page.write_text(resource_page.text(RESULTS))
    monkeypatch.setattr(resource_page, "PAGE", page)
    asked = []

    def measured(cases: object, kernels: object, jobs: int) -> list[tuple[str, Usage]]:
        asked.append(cases)
        return [(RESULTS[0][0], replace(PLAIN, **changes)), *RESULTS[1:]]

    monkeypatch.setattr(triton_resources, "measured", measured)
    monkeypatch.setattr(sys, "argv", ["triton_resources.py", "--compare"])
    assert triton_resources.main() == status
    assert asked == [triton_resources.EVERY_CASE]


def test_nothing_compiled_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_resources, "measured", lambda *arguments: [])
    monkeypatch.setattr(sys, "argv", ["triton_resources.py", "--print"])
    assert triton_resources.main() == 1


def test_what_a_kernel_uses_is_what_tritons_own_assembler_said(tmp_path: Path) -> None:
    """Its options are Triton's to choose, and with other options another number of registers spills."""
    # What is assembled in the first launch is compiled already in the second.
    reports = ["8 bytes spill stores, 16 bytes spill loads\nUsed 42 registers"]
    compiled = SimpleNamespace(hash="a kernel of test_resource_page.py", asm={})

    class Kernel:
        def fn(self) -> None: ...

        def warmup(self, variant: str, grid: Any) -> SimpleNamespace:
            if reports:
                say = f"import sys; print({reports.pop()!r}, file=sys.stderr)"
                with open(tmp_path / "log", "w") as log:  # as make_cubin of every Triton from 3.4 to 3.7 calls ptxas
                    compiler.subprocess.run([sys.executable, "-c", say], check=True, close_fds=False, stderr=log)
            return compiled

    kept: list[Any] = []
    kernel = CompileOnly(Kernel(), lambda *result: kept.append(result), lambda name, variant: variant != "unwanted")
    for variant in ("one", "unwanted", "another"):
        kernel[None](variant)
        assert registers_and_spills(compiled, "sm_90") == (42, 24)
        assert compiler.subprocess is subprocess
    assert kept == [("fn", "one", compiled), ("fn", "another", compiled)]
    with pytest.raises(KeyError):
        registers_and_spills(SimpleNamespace(hash="of the cache"), "sm_90")


def test_the_page_has_every_case_and_no_spill() -> None:
    page = resource_page.PAGE.read_text()
    assert f"Triton {triton.__version__}," in page
    found = resource_page.cells(page)
    titles = {name: text.partition("\n")[0].strip("# ") for name, text in resource_page.SECTIONS.items()}
    having = {(section, target, case, dtype, width) for section, target, _, case, dtype, width, _ in found}
    wanted = {
        (titles[case.section], case.target, case.name, case.dtype, str(case.width))
        for case in triton_resources.EVERY_CASE
        if case.section != "candidates"  # not every case has candidates with descriptors
    }
    assert wanted <= having
    assert {numbers[1] for numbers in found.values()} == {"0"}
    # sm_86, sm_89 and sm_120 take the tiles of sm_80 with less shared memory.
    kibibytes = [int(numbers[2]) for (_, target, *_), numbers in found.items() if target == "sm_80"]
    assert max(kibibytes) * 1024 <= SHARED_MEMORY["sm_86"]
