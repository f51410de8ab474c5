"""What a benchmark run measured: its records, the JSON document and the table."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sightline.cli.limits import format_bytes
from sightline.cli.measure import Spread, attention_flops
from sightline.cli.stack import ROW_LABELS
from sightline.cli.timed_run import RunTime

SCHEMA = "sightline-bench/1"
BASELINE = "sdpa"


@dataclass
class Measurement:
    """One row at one context length, filled in while the benchmark runs.

    `skipped` and `failed` hold the reason; a row without samples or reason was not reached.
    """

    row: str
    tokens: int
    samples: list[RunTime] = field(default_factory=list)
    peak_bytes: int | None = None
    memory_method: str | None = None
    skipped: str | None = None
    failed: str | None = None

    @property
    def status(self) -> str:
        """`measured`, `skipped`, `failed` or `not reached`."""
        if self.failed:
            return "failed"
        if self.skipped:
            return "skipped"
        return "measured" if self.samples else "not reached"

    def median_seconds(self) -> float:
        """Median time of a forward pass in seconds."""
        return Spread.of([sample.total for sample in self.samples]).median


def record(
    measurement: Measurement, baseline: Measurement, model: dict[str, Any], peak_gflops: float
) -> dict[str, Any]:
    """One measurement as it stands in the JSON document; rates are per second, ratios are above 1 when better.

    Args:
        measurement: the row.
        baseline: torch SDPA at the same length.
        model: the `model` entry of the document, with the number of decoding steps.
        peak_gflops: the machine's matrix-product rate.
    """
    result: dict[str, Any] = {
        "row": measurement.row,
        "label": ROW_LABELS[measurement.row],
        "tokens": measurement.tokens,
        "status": measurement.status,
        "reason": measurement.failed or measurement.skipped,
        "peak_extra_bytes": measurement.peak_bytes,
        "memory_method": measurement.memory_method,
    }
    if measurement.status != "measured":
        return result
    times = [sample.total for sample in measurement.samples]
    attention = Spread.of([sample.attention for sample in measurement.samples])
    flops = model["layers"] * attention_flops(model["heads"], measurement.tokens, model["head_dim"], model["head_dim"])
    gflops = flops / attention.median / 1e9
    compared = baseline.status == "measured"
    if model.get("decode_steps"):
        steps = model["decode_steps"]
        result["decode"] = {
            "steps": steps,
            "seconds_per_token": asdict(Spread.of([sample.decode / steps for sample in measurement.samples])),
            "tokens_per_second": asdict(Spread.of([steps / sample.decode for sample in measurement.samples])),
        }
    return result | {
        "repetitions": len(times),
        "seconds": asdict(Spread.of(times)),
        "tokens_per_second": asdict(Spread.of([measurement.tokens / seconds for seconds in times])),
        "attention_seconds": asdict(attention),
        "attention_gflops": gflops,
        "share_of_peak": gflops / peak_gflops if peak_gflops else None,
        "ratio_to_sdpa": baseline.median_seconds() / measurement.median_seconds() if compared else None,
    }


def write_json(document: dict[str, Any], path: Path) -> None:
    """Write the document, readable for people too; a file that is there is replaced whole or not at all.

    Raises:
        OSError: there is no room for it, or no right to write.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text(json.dumps(document, indent=1) + "\n")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def table(results: Sequence[dict[str, Any]]) -> str:
    """The results as text, one block per context length."""
    lines: list[str] = []
    decoding = f"{'decode, tokens/s':>18}" if any("decode" in result for result in results) else ""
    for tokens in sorted({result["tokens"] for result in results}):
        block = [result for result in results if result["tokens"] == tokens]
        lines += ["", f"{tokens:,} tokens"]
        lines.append(
            f"  {'':<18}{'tokens/s':>12}{'p10 - p90':>21}{'x SDPA':>9}{'peak memory':>14}{'GFLOP/s':>10}{'of peak':>9}"
            + decoding
        )
        lines += [_table_row(result) for result in block]
    return "\n".join(lines)


def _table_row(result: dict[str, Any]) -> str:
    label = f"  {result['label']:<18}"
    if result["status"] != "measured":
        reason = f" ({result['reason']})" if result["reason"] else ""
        return f"{label}    {result['status']}{reason}"
    rate, ratio, peak = result["tokens_per_second"], result["ratio_to_sdpa"], result["peak_extra_bytes"]
    share = result["share_of_peak"]
    spread = f"{rate['p10']:,.0f} - {rate['p90']:,.0f}"
    return (
        f"{label}{rate['median']:>12,.0f}{spread:>21}"
        f"{'-' if ratio is None else f'{ratio:.2f}':>9}"
        f"{'-' if peak is None else format_bytes(peak):>14}"
        f"{result['attention_gflops']:>10,.0f}{'-' if share is None else f'{share:.0%}':>9}"
        + (f"{result['decode']['tokens_per_second']['median']:>18,.1f}" if "decode" in result else "")
    )


def print_and_write(text: str, document: dict[str, Any], path: Path) -> None:
    """Write the document, then print its table, or the other way round where it cannot be written.

    Raises:
        OSError: it cannot be written, or nobody reads what is printed.
    """
    try:
        write_json(document, path)
    except OSError:
        print(text, flush=True)
        raise
    print(text, flush=True)


def run_and_write(command: str, measure: Callable[[], None], write: Callable[[bool], list[str]]) -> int:
    """Measure, then write what was measured, whatever ended it.

    Args:
        command: its name, for what is said on stderr.
        measure: the work.
        write: writes what there is, told whether Ctrl-C ended the work, and returns the status of every row.

    Returns:
        The exit code: 1 where a row failed, 130 after Ctrl-C, else 0.
    """
    interrupted = False
    try:
        measure()
    except KeyboardInterrupt:
        interrupted = True
    except BaseException:
        with _deaf_to_interrupts():
            write(False)
        raise
    with _deaf_to_interrupts():
        statuses = write(interrupted)
    if interrupted:
        finished = f"{statuses.count('measured')} of {len(statuses)} rows were measured and written"
        print(f"sightline {command}: interrupted; {finished}", file=sys.stderr)
        return 130
    return int("failed" in statuses)


@contextlib.contextmanager
def _deaf_to_interrupts() -> Iterator[None]:
    """A second Ctrl-C while results are written would lose them. Only the main thread hears it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
