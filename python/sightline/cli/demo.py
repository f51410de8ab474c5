"""`sightline demo`: attention exchanged inside transformers models, with nothing changed but the attention.

First a trained sentence model embeds real passages before and after the swap. Then a whole language model runs over
real text with each attention in turn, prefill and decoding apart.
"""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path
from sysconfig import get_paths
from typing import Any

import torch

import sightline as sl
from sightline.cli import environment, limits, report
from sightline.cli.bench import choose_device
from sightline.cli.bench_settings import WrongArgumentError, first_line
from sightline.cli.corpus import Corpus, documentation_strings, read_corpus
from sightline.cli.demo_settings import DemoSettings
from sightline.cli.measure import Spread, interleave, repetitions_within
from sightline.cli.peak_memory import describe_error
from sightline.cli.progress import Progress
from sightline.cli.sentence_model import embed, load_sentence_model
from sightline.cli.stack import ROW_LABELS
from sightline.cli.whole_model import Times, WholeModel
from sightline.ops import choose_backend

SCHEMA = "sightline-demo/1"
_SHORTEST_PASSAGE = 80  # characters
_BATCH = 16
_MEMORY_SHARE = 0.6
_BYTES_PER_TOKEN = 8  # of text, more than any tokenizer needs


def real_passages(count: int) -> list[str]:
    """Documentation strings of the Python standard library, long enough to say something."""
    texts = documentation_strings(Path(get_paths()["stdlib"]))
    return list(islice((text for text in texts if len(text) >= _SHORTEST_PASSAGE), count))


def compare_embeddings(count: int) -> dict[str, Any]:
    """Embed real passages with the sentence model before and after the swap; what differed, and how long it took."""
    passages = real_passages(count)
    model, tokenizer = load_sentence_model("sdpa")
    batches = [passages[first : first + _BATCH] for first in range(0, len(passages), _BATCH)]

    def embed_all() -> tuple[torch.Tensor, float]:
        embed(model, tokenizer, batches[0])
        begin = time.perf_counter()
        found = torch.cat([embed(model, tokenizer, batch) for batch in batches])
        return found, time.perf_counter() - begin

    before, seconds_before = embed_all()
    sl.swap_attention(model, sl.Softmax())
    after, seconds_after = embed_all()
    return {
        "model": "sentence-transformers/all-MiniLM-L6-v2",
        "passages": len(passages),
        "smallest_cosine": float(torch.nn.functional.cosine_similarity(after.double(), before.double()).min()),
        "largest_difference": float((after - before).abs().max()),
        "passages_per_second": {"sdpa": len(passages) / seconds_before, "softmax": len(passages) / seconds_after},
    }


class _Throughput:
    """The rows of one model over its lengths: times, or why there are none."""

    def __init__(self, settings: DemoSettings, model: WholeModel) -> None:
        self.settings, self.model = settings, model
        self.times: dict[tuple[int, str], list[Times]] = {}
        self.reasons: dict[tuple[int, str], str] = {}
        self.failed: set[tuple[int, str]] = set()
        rows = len(ROW_LABELS)
        self.progress = Progress(sum(rows * length**2 for length in settings.lengths))

    def run(self, corpus: Corpus) -> None:
        for length in self.settings.lengths:
            rows = []
            for row in ROW_LABELS:
                reason = self._skip_reason(row, length)
                if reason is None:
                    rows.append(row)
                else:
                    self.reasons[length, row] = reason
                    self.progress.advance(length**2)
            if not rows:
                continue
            tokens = self.model.tokens(corpus, length)
            runs = {row: partial(self.model.time, row, tokens, self.settings.new_tokens) for row in rows}
            repetitions = {row: self._repetitions(row, length) for row in runs}
            for turn, row, sample in interleave(runs, repetitions):
                self.progress.show(f"{length:,} tokens: {ROW_LABELS[row]}, round {turn}")
                self.progress.advance(length**2 / repetitions[row])
                if isinstance(sample, Exception):
                    self.reasons[length, row] = describe_error(sample)
                    self.times.pop((length, row), None)
                    if not isinstance(sample, torch.OutOfMemoryError):
                        self.failed.add((length, row))
                else:
                    self.times.setdefault((length, row), []).append(sample)

    def _expected(self, row: str, length: int) -> float | None:
        shorter = [(tokens, found) for (tokens, name), found in self.times.items() if name == row and tokens < length]
        if not shorter:
            return None
        tokens, found = shorter[-1]
        ratio = length / tokens
        # Projections grow with the length, attention with its square; a cached step with the length at most.
        return min(sample.prefill * ratio**1.5 + sample.decoding * ratio for sample in found)

    def _repetitions(self, row: str, length: int) -> int:
        expected = self._expected(row, length)
        if expected is None:
            # The first run of a row pays for what only first runs pay.
            return self.settings.repetitions + 1
        return repetitions_within(self.settings.time_limit, expected, self.settings.repetitions)

    def _skip_reason(self, row: str, length: int) -> str | None:
        available = environment.available_memory(self.model.device)
        need = limits.expected_memory(
            self.model.shape, length, self.model.model.dtype.itemsize, materialises=row == "eager"
        )
        reason = limits.memory_reason(need, None if available is None else int(_MEMORY_SHARE * available))
        if reason is not None:
            return f"{reason} (60 % of the available memory)"
        if any(name == row and tokens < length for tokens, name in self.reasons):
            return "skipped at a shorter length"
        expected = self._expected(row, length)
        return None if expected is None else limits.time_reason(expected, self.settings.time_limit)

    def results(self) -> list[dict[str, Any]]:
        """One record per row and length; ratios above 1 are faster than torch SDPA."""
        return [self._record(length, row) for length in self.settings.lengths for row in ROW_LABELS]

    def _record(self, length: int, row: str) -> dict[str, Any]:
        record: dict[str, Any] = {"row": row, "label": ROW_LABELS[row], "tokens": length}
        samples = self._samples(length, row)
        if not samples:
            reason = self.reasons.get((length, row))
            status = "failed" if (length, row) in self.failed else "skipped" if reason else "not reached"
            return {**record, "status": status, "reason": reason}
        baseline = self._samples(length, "sdpa")
        record.update(status="measured", reason=None, repetitions=len(samples))
        for part, tokens in (("prefill", length), ("decoding", self.settings.new_tokens)):
            spread = Spread.of([tokens / getattr(sample, part) for sample in samples])
            record[f"{part}_tokens_per_second"] = asdict(spread)
            record[f"{part}_ratio_to_sdpa"] = (
                spread.median / Spread.of([tokens / getattr(sample, part) for sample in baseline]).median
                if baseline
                else None
            )
        return record

    def _samples(self, length: int, row: str) -> list[Times]:
        samples = self.times.get((length, row), [])
        return samples[1:] if length == min(self.settings.lengths) and len(samples) > 1 else samples


def throughput_table(results: Sequence[dict[str, Any]]) -> str:
    """The records as text, one block per length."""
    lines: list[str] = []
    for tokens in sorted({result["tokens"] for result in results}):
        lines += ["", f"prompt of {tokens:,} tokens"]
        lines.append(f"  {'':<18}{'prefill tokens/s':>18}{'x SDPA':>9}{'decoding tokens/s':>20}{'x SDPA':>9}")
        for result in results:
            if result["tokens"] == tokens:
                lines.append(_table_row(result))
    return "\n".join(lines)


def _table_row(result: dict[str, Any]) -> str:
    label = f"  {result['label']:<18}"
    if result["status"] != "measured":
        return f"{label}  {result['status']}" + (f" ({result['reason']})" if result["reason"] else "")
    cells = ""
    for part, width in (("prefill", 18), ("decoding", 20)):
        ratio = result[f"{part}_ratio_to_sdpa"]
        rate = f"{result[f'{part}_tokens_per_second']['median']:,.0f}"
        cells += f"{rate:>{width}}{'-' if ratio is None else f'{ratio:.2f}':>9}"
    return label + cells


def run(settings: DemoSettings, command: Sequence[str]) -> int:
    """Run both parts, print them, write `demo.json`.

    Returns:
        0 when everything was measured or skipped with a reason, 1 when a row failed, 130 when Ctrl-C ended it early;
        what was measured until then is written all the same.

    Raises:
        WrongArgumentError: transformers is missing, the device, model or text is not there.
    """
    try:
        import transformers
    except ModuleNotFoundError:
        raise WrongArgumentError("transformers is missing: pip install sightline[demo]") from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    device = choose_device(settings.device)
    try:
        corpus = read_corpus(settings.text, _BYTES_PER_TOKEN * max(settings.lengths))
    except (OSError, ValueError) as error:
        raise WrongArgumentError(f"argument --text: {error}") from None
    try:
        dtype = getattr(torch, settings.dtype)
        choose_backend(torch.empty(1, 1, 1, 1, dtype=dtype, device=device), "auto")
    except (ValueError, RuntimeError) as error:
        raise WrongArgumentError(first_line(error)) from None
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    document: dict[str, Any] = {
        "schema": SCHEMA,
        "command": shlex.join(command),
        "device": environment.describe_device(device),
        "versions": {**environment.versions(), "transformers": transformers.__version__},
        "dtype": settings.dtype,
        "embeddings": _embeddings(settings.passages),
    }
    longest = max(settings.lengths) + settings.new_tokens
    model = WholeModel(settings.model, longest, getattr(torch, settings.dtype), device)
    shape = model.shape
    document["model"] = {"name": model.name, "parameters": model.parameters(), **asdict(shape)}
    print(
        f"\n{model.name}: {shape.layers} layers of width {shape.width}, {shape.heads} query heads on {shape.kv_heads} "
        f"key heads, {model.parameters() / 1e6:.1f} M weights, {settings.dtype}\n"
        f"{document['device']['name']}, {document['device']['threads']} threads; prompt: real text, then "
        f"{settings.new_tokens} tokens decoded",
        flush=True,
    )
    throughput = _Throughput(settings, model)

    def written(interrupted: bool) -> list[str]:
        throughput.progress.close()
        document.update(interrupted=interrupted, results=throughput.results())
        path = settings.output / "demo.json"
        report.print_and_write(throughput_table(document["results"]), document, path)
        print(f"\nwritten: {path}", flush=True)
        return [found["status"] for found in document["results"]]

    return report.run_and_write("demo", partial(throughput.run, corpus), written)


def _embeddings(count: int) -> dict[str, Any]:
    """The first part, printed; where its model is not installed, how to get it."""
    try:
        found = compare_embeddings(count)
    except ModuleNotFoundError as error:
        print(f"sightline demo: {error}", file=sys.stderr)
        return {"skipped": str(error)}
    rates = found["passages_per_second"]
    print(
        f"{found['model']} embeds {found['passages']} passages of the Python standard library's documentation\n"
        f"  torch SDPA        {rates['sdpa']:>8,.0f} passages/s\n"
        f"  sightline Softmax {rates['softmax']:>8,.0f} passages/s; before and after the swap: smallest cosine "
        f"{found['smallest_cosine']:.8f}, largest difference {found['largest_difference']:.1e}",
        flush=True,
    )
    return found
