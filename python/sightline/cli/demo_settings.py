"""Arguments of `sightline demo`: their definition, their checks, and the settings that come out of them."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from sightline.cli.bench_settings import (
    DTYPES,
    check_output,
    check_text,
    context_lengths,
    device_name,
    dtype_name,
    positive_integer,
    positive_seconds,
    thread_count,
)

DEFAULT_LENGTHS = (1024, 4096, 16384)
QUICK_LENGTHS = (128, 256)


@dataclass(frozen=True)
class DemoSettings:
    """Everything one run of `sightline demo` depends on; lengths ascend, times are seconds.

    model: a folder or a name for transformers' `from_pretrained`; None is a Llama from a config, with random weights.
    """

    model: str | None
    lengths: tuple[int, ...]
    new_tokens: int
    passages: int
    dtype: str
    device: str
    threads: int | None
    repetitions: int
    time_limit: float
    text: Path | None
    output: Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `sightline demo` to its parser."""
    later = argparse.SUPPRESS

    def add(name: str, convert: object, metavar: str, default: object, text: str) -> None:
        parser.add_argument(name, type=convert, metavar=metavar, default=default, help=text)  # type: ignore[arg-type]

    model = "folder or name of a causal language model (default: a Llama from a config, with random weights)"
    add("--model", str, "DIR_OR_NAME", later, model)
    lengths = ",".join(map(str, DEFAULT_LENGTHS))
    add("--lengths", context_lengths, "N,N,...", later, f"prompt lengths in tokens (default: {lengths})")
    add("--new-tokens", positive_integer, "T", 16, "tokens decoded after each prompt")
    add("--passages", positive_integer, "P", 64, "passages for the sentence model")
    add("--dtype", dtype_name, "DTYPE", DTYPES[0], ", ".join(DTYPES))
    add("--device", device_name, "DEVICE", "auto", "auto (cuda when there is one), cpu, cuda or cuda:INDEX")
    add("--threads", thread_count, "T", later, "CPU threads (default: torch's choice)")
    add("--repetitions", positive_integer, "R", later, "rounds at each length, fewer within --time-limit (default: 3)")
    add(
        "--time-limit",
        positive_seconds,
        "SECONDS",
        10.0,
        "for one row at one length; where one run needs more, it is skipped",
    )
    add("--text", Path, "FILE", later, "its text is the prompt (default: the standard library's documentation)")
    add("--output", Path, "DIR", Path("sightline-demo"), "directory for demo.json")
    parser.add_argument("--quick", action="store_true", help="the whole thing in seconds: short prompts, one round")


def settings_from(arguments: argparse.Namespace) -> DemoSettings:
    """Check what single arguments cannot check by themselves and build the settings; creates the output directory.

    Raises:
        WrongArgumentError: the text cannot be read, or the output not be written.
    """
    given = vars(arguments)
    quick = given["quick"]
    text = given.get("text")
    if text is not None:
        check_text(text)
    check_output(given["output"])
    return DemoSettings(
        model=given.get("model"),
        lengths=given.get("lengths", QUICK_LENGTHS if quick else DEFAULT_LENGTHS),
        new_tokens=given["new_tokens"],
        passages=given["passages"],
        dtype=given["dtype"],
        device=given["device"],
        threads=given.get("threads"),
        repetitions=given.get("repetitions", 1 if quick else 3),
        time_limit=given["time_limit"],
        text=text,
        output=given["output"],
    )
