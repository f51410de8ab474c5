"""Arguments of `sightline bench`: their definition, their checks, and the settings that come out of them.

Nothing here imports torch, so that wrong input is refused at once. What depends on the device is left open until torch
has been asked for one: `BenchSettings.on`.
"""

from __future__ import annotations

import argparse
import math
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

DTYPES = ("float32", "bfloat16", "float16")
DEFAULT_LENGTHS = (1024, 2048, 4096, 8192, 16384)
GPU_LENGTHS = tuple(1024 << step for step in range(2, 11))  # 4K to 1M
QUICK_LENGTHS = (128, 256, 512)

_UNIT_PREFIXES = " KMGT"
_MOST_THREADS = 4096
_LONGEST = 2**31 - 65  # what the kernels can count


class WrongArgumentError(ValueError):
    """An argument of the command that cannot be used; the message names it, says what was expected and what came."""


@dataclass(frozen=True)
class StackShape:
    """Shape of the model: layers of H query heads of width D on Hk key heads, model width H * D.

    `feed_forward`: width of the hidden units of the gated feed-forward part of a layer; 0 leaves it out.
    """

    layers: int = 2
    heads: int = 8
    kv_heads: int = 4
    head_dim: int = 64
    feed_forward: int = 0

    @property
    def width(self) -> int:
        """Width of the residual stream, H * D."""
        return self.heads * self.head_dim


@dataclass(frozen=True)
class DeviceDefaults:
    """What is measured where nothing is said: on the CPU attention alone, on a GPU a whole model and its decoding."""

    lengths: tuple[int, ...]
    shape: StackShape
    dtype: str
    time_limit: float
    decode_steps: int


DEFAULTS = {
    "cpu": DeviceDefaults(DEFAULT_LENGTHS, StackShape(), DTYPES[0], 10.0, 0),
    "cuda": DeviceDefaults(GPU_LENGTHS, StackShape(2, 16, 4, 128, 5632), DTYPES[1], 45.0, 64),
}


@dataclass(frozen=True)
class BenchSettings:
    """Everything one run of `sightline bench` depends on; lengths ascend, sizes are bytes, times seconds."""

    lengths: tuple[int, ...]
    shape: StackShape
    dtype: str
    device: str
    threads: int | None
    repetitions: int
    time_limit: float
    memory_limit: int | None
    text: Path | None
    output: Path
    quick: bool
    decode_steps: int


@dataclass(frozen=True)
class RequestedBench:
    """What the command line says; the rest follows from the kind of device."""

    given: dict[str, Any]

    def on(self, device_kind: str) -> BenchSettings:
        """The settings on a device of kind "cpu" or "cuda".

        Raises:
            WrongArgumentError: heads that do not divide, an odd D.
        """
        given, defaults = self.given, DEFAULTS[device_kind]
        quick = given.get("quick", False)
        shape = {field.name: given.get(field.name, getattr(defaults.shape, field.name)) for field in fields(StackShape)}
        if quick and "layers" not in given:
            shape["layers"] = 1
        if shape["heads"] % shape["kv_heads"]:
            raise WrongArgumentError(
                f"argument --heads: expected a multiple of --kv-heads {shape['kv_heads']}, got {shape['heads']}"
            )
        if shape["head_dim"] % 2:
            raise WrongArgumentError(
                f"argument --head-dim: expected an even width (rotary embedding turns pairs), got {shape['head_dim']}"
            )
        return BenchSettings(
            lengths=given.get("lengths", QUICK_LENGTHS if quick else defaults.lengths),
            shape=StackShape(**shape),
            dtype=given.get("dtype", defaults.dtype),
            device=given["device"],
            threads=given.get("threads"),
            repetitions=given.get("repetitions", 2 if quick else 5),
            time_limit=given.get("time_limit", defaults.time_limit),
            memory_limit=given.get("memory_limit"),
            text=given.get("text"),
            output=given["output"],
            quick=quick,
            decode_steps=given.get("decode", defaults.decode_steps),
        )


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def thread_count(text: str) -> int:
    number = positive_integer(text)
    if number > _MOST_THREADS:
        raise argparse.ArgumentTypeError(f"expected at most {_MOST_THREADS} threads, got {text!r}")
    return number


def positive_integer(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}") from None
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return number


def _count(text: str) -> int:
    return 0 if text == "0" else positive_integer(text)


def context_lengths(text: str) -> tuple[int, ...]:
    expected = "expected whole numbers of at least 1 separated by commas, as in 1024,4096"
    try:
        lengths = [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{expected}, got {text!r}") from None
    if min(lengths) < 1:
        raise argparse.ArgumentTypeError(f"{expected}, got {text!r}")
    if max(lengths) > _LONGEST:
        raise argparse.ArgumentTypeError(f"expected lengths of at most {_LONGEST}, got {text!r}")
    return tuple(sorted(set(lengths)))


def positive_seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = float("nan")
    if not seconds > 0:
        raise argparse.ArgumentTypeError(f"expected a positive number of seconds, got {text!r}")
    return seconds


def dtype_name(text: str) -> str:
    if text not in DTYPES:
        raise argparse.ArgumentTypeError(f"expected one of {', '.join(DTYPES)}, got {text!r}")
    return text


def device_name(text: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"expected auto, cpu, cuda or cuda:INDEX, got {text!r}")
    return text


def byte_size(text: str) -> int:
    """Parse a size such as `8GiB`, `512M` (both binary), `8GB` (decimal) or `1e9` into bytes.

    Raises:
        argparse.ArgumentTypeError: the text is no positive size.

    Example:
        >>> byte_size("1.5KiB")
        1536
    """
    match = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]+)?)\s*([KMGT]?)(i?)(B?)\s*", text, re.IGNORECASE)
    try:
        number = float(match[1]) if match else 0.0
    except ValueError:
        number = 0.0
    size = 0
    if match:
        decimal = match[4] and not match[3]
        scaled = number * (1000 if decimal else 1024) ** _UNIT_PREFIXES.index(match[2].upper() or " ")
        size = int(scaled) if math.isfinite(scaled) else 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"expected a size such as 8GiB or 512MiB, got {text!r}")
    return size


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `sightline bench` to its parser.

    Defaults that depend on `--quick` or on the machine are absent from the parsed arguments unless given.
    """
    cpu, gpu = DEFAULTS["cpu"], DEFAULTS["cuda"]
    whole, decided_later = positive_integer, argparse.SUPPRESS

    def add(name: str, convert: Callable[[str], object], metavar: str, default: object, text: str) -> None:
        parser.add_argument(name, type=convert, metavar=metavar, default=default, help=text)

    def by_device(name: str, convert: Callable[[str], object], metavar: str, text: str, on: Callable[..., Any]) -> None:
        add(name, convert, metavar, decided_later, f"{text} (default: {on(cpu)}, on a GPU {on(gpu)})")

    lengths = "context lengths in tokens"
    by_device("--lengths", context_lengths, "N,N,...", lengths, lambda d: ",".join(map(str, d.lengths)))
    by_device("--layers", whole, "L", "layers", lambda d: d.shape.layers)
    by_device("--heads", whole, "H", "query heads", lambda d: d.shape.heads)
    by_device("--kv-heads", whole, "HK", "key/value heads, of which H is a multiple", lambda d: d.shape.kv_heads)
    by_device("--head-dim", whole, "D", "width of a head, even for the rotary embedding", lambda d: d.shape.head_dim)
    by_device(
        "--feed-forward", _count, "F", "hidden units of each layer's feed-forward part", lambda d: d.shape.feed_forward
    )
    by_device("--dtype", dtype_name, "DTYPE", ", ".join(DTYPES), lambda d: d.dtype)
    by_device("--decode", _count, "STEPS", "tokens generated after each context, timed apart", lambda d: d.decode_steps)
    add("--device", device_name, "DEVICE", "auto", "auto (cuda when there is one), cpu, cuda or cuda:INDEX")
    add("--threads", thread_count, "T", decided_later, "CPU threads (default: torch's choice)")
    add("--repetitions", whole, "R", decided_later, "rounds at each length, fewer within --time-limit (default: 5)")
    limit = "for one row at one length; where one run needs more, it is skipped"
    by_device("--time-limit", positive_seconds, "SECONDS", limit, lambda d: d.time_limit)
    add(
        "--memory-limit",
        byte_size,
        "SIZE",
        decided_later,
        "rows that need more are skipped (default: 60%% of what is free, on a GPU all of it)",
    )
    add(
        "--text",
        Path,
        "FILE",
        decided_later,
        "its bytes are the tokens (default: the standard library's documentation)",
    )
    add("--output", Path, "DIR", Path("sightline-bench"), "directory for bench.json and bench.png")
    parser.add_argument(
        "--quick",
        action="store_true",
        default=decided_later,
        help="the whole thing in seconds: short lengths, one layer, 2 rounds",
    )


def request_from(arguments: argparse.Namespace) -> RequestedBench:
    """Check what single arguments cannot check by themselves.

    Creates the output directory: a run of minutes must not end at a directory that cannot be written.

    Raises:
        WrongArgumentError: the text cannot be read, or the output not be written.
    """
    given = vars(arguments)
    if "text" in given:
        check_text(given["text"])
    check_output(given["output"])
    return RequestedBench(given)


def check_text(path: Path) -> None:
    try:
        with path.open("rb") as file:
            empty = not file.read(1)
    except OSError as error:
        raise WrongArgumentError(f"argument --text: cannot read {path}: {error.strerror}") from None
    if empty:
        raise WrongArgumentError(f"argument --text: expected text, but {path} is empty")


def check_output(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise WrongArgumentError(f"argument --output: cannot write to {directory}: {error.strerror}") from None
