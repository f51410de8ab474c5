"""The section of docs/performance.md that says target by target what the CPU kernels reach."""

from __future__ import annotations

from collections.abc import Sequence

from page.attention_targets import attention_targets, rates_of_sdpa
from page.markdown import markdown_table
from page.reasons import REASONS
from page.recurrence_targets import recurrence_targets
from page.targets import UNMEASURED, Documents, Target

# Kinds of documents that targets speak of.
ATTENTION = ("attention", "decoding", "options")
SUBJECTS = (*ATTENTION, "recurrence")
INTRODUCTION = """\
What the kernels are meant to reach, and the worst of the cases that each target speaks of. The numbers wanted were set
with a two-core machine that has AVX-512-BF16 and no tile unit (AMX): there 515 GFLOP/s in float32 and 1,025 in bfloat16
(vdpbf16ps) are the most that registers multiply, memory is read with 66 GB/s, and the chunked formula of the recurrence
takes 40 us per token. Ratios to torch SDPA depend on how fast that is: where torch multiplies bfloat16 on a tile unit,
it is several times faster than there.
"""


def targets_section(documents: Documents) -> list[str]:
    """Every target of what one machine measured: attention, the recurrence or both; none where neither was."""
    if not any(kind in documents for kind in SUBJECTS):
        return []
    document = next(iter(documents.values()))
    device, isa = document["device"], document["instruction_set"]["chosen"]
    where = f"{device['name']}, {device['threads']} threads, instruction set {isa}"
    lines = [f"## CPU targets on {where}", "", INTRODUCTION]
    reasons = REASONS.get(isa, {})
    if any(kind in documents for kind in ATTENTION):
        lines += markdown_table(
            [
                "causal, B = 1, H = 8, GFLOP/s",
                "torch SDPA, targets' machine",
                "torch SDPA, here",
                "registers, targets' machine",
                "registers, here",
            ],
            rates_of_sdpa(documents),
        )
        lines += target_table("attention", list(attention_targets()), documents, reasons)
    if "recurrence" in documents:
        targets = list(recurrence_targets())
        lines += target_table("additive recurrence, H = 8, D = 128", targets, documents, reasons)
    return lines


def target_table(title: str, targets: Sequence[Target], documents: Documents, reasons: dict[str, str]) -> list[str]:
    """Targets of one subject, with how many of them are met."""
    rows = [target.row(documents, reasons) for target in targets]
    met, open_rows = sum(row[4] == "yes" for row in rows), sum(row[2] == UNMEASURED for row in rows)
    lines = [f"### Targets of {title}", "", f"Of {len(rows)} targets {met} are met and {open_rows} unmeasured.", ""]
    return lines + markdown_table(["target", "wanted", "measured", "where", "met", "why not"], rows, 6)
