"""Arguments of `sightline bench`: their definition, their checks, and the settings that come out of them.

Nothing here imports torch, so that wrong input is refused at once; only the choice of device has to ask it.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

DTYPES = ("float32", "bfloat16", "float16")
DEFAULT_LENGTHS = (1024, 2048, 4096, 8192, 16384)
QUICK_LENGTHS = (128, 256, 512)

_UNIT_PREFIXES = " KMGT"


class WrongArgumentError(ValueError):
    """An argument of the command that cannot be used; the message names it, says what was expected and what came."""


@dataclass(frozen=True)
class StackShape:
    """Shape of the stack of attention layers: H query heads of width D on Hk key heads, model width H * D."""

    layers: int = 2
    heads: int = 8
    kv_heads: int = 4
    head_dim: int = 64

    @property
    def width(self) -> int:
        """Width of the residual stream, H * D."""
        return self.heads * self.head_dim


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


def positive_integer(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}") from None
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return number


def context_lengths(text: str) -> tuple[int, ...]:
    expected = "expected whole numbers of at least 1 separated by commas, as in 1024,4096"
    try:
        lengths = [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{expected}, got {text!r}") from None
    if min(lengths) < 1:
        raise argparse.ArgumentTypeError(f"{expected}, got {text!r}")
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
        size = int(number * (1000 if decimal else 1024) ** _UNIT_PREFIXES.index(match[2].upper() or " "))
    if size < 1:
        raise argparse.ArgumentTypeError(f"expected a size such as 8GiB or 512MiB, got {text!r}")
    return size


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `sightline bench` to its parser.

    Defaults that depend on `--quick` or on the machine are absent from the parsed arguments unless given.
    """
    shape = StackShape()
    lengths = ",".join(map(str, DEFAULT_LENGTHS))
    whole, decided_later = positive_integer, argparse.SUPPRESS

    def add(name: str, convert: Callable[[str], object], metavar: str, default: object, text: str) -> None:
        parser.add_argument(name, type=convert, metavar=metavar, default=default, help=text)

    add("--lengths", context_lengths, "N,N,...", decided_later, f"context lengths in tokens (default: {lengths})")
    add("--layers", whole, "L", decided_later, f"attention layers (default: {shape.layers})")
    add("--heads", whole, "H", shape.heads, "query heads")
    add("--kv-heads", whole, "HK", shape.kv_heads, "key/value heads, of which H is a multiple")
    add("--head-dim", whole, "D", shape.head_dim, "width of a head, even for the rotary embedding")
    add("--dtype", dtype_name, "DTYPE", DTYPES[0], ", ".join(DTYPES))
    add("--device", device_name, "DEVICE", "auto", "auto (cuda when there is one), cpu, cuda or cuda:INDEX")
    add("--threads", whole, "T", decided_later, "CPU threads (default: torch's choice)")
    add("--repetitions", whole, "R", decided_later, "rounds at each length, fewer within --time-limit (default: 5)")
    add(
        "--time-limit",
        positive_seconds,
        "SECONDS",
        10.0,
        "for one row at one length; where one run needs more, it is skipped",
    )
    add(
        "--memory-limit",
        byte_size,
        "SIZE",
        decided_later,
        "rows that need more are skipped (default: 60%% of what is free)",
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


def settings_from(arguments: argparse.Namespace) -> BenchSettings:
    """Check what single arguments cannot check by themselves and build the settings.

    Creates the output directory: a run of minutes must not end at a directory that cannot be written.

    Raises:
        WrongArgumentError: heads do not divide, D is odd, the text cannot be read, or the output not be written.
    """
    given = vars(arguments)
    quick = given.get("quick", False)
    if given["heads"] % given["kv_heads"]:
        raise WrongArgumentError(
            f"argument --heads: expected a multiple of --kv-heads {given['kv_heads']}, got {given['heads']}"
        )
    if given["head_dim"] % 2:
        raise WrongArgumentError(
            f"argument --head-dim: expected an even width (rotary embedding turns pairs), got {given['head_dim']}"
        )
    text = given.get("text")
    if text is not None:
        check_text(text)
    check_output(given["output"])
    layers = given.get("layers", 1 if quick else StackShape.layers)
    return BenchSettings(
        lengths=given.get("lengths", QUICK_LENGTHS if quick else DEFAULT_LENGTHS),
        shape=StackShape(layers, given["heads"], given["kv_heads"], given["head_dim"]),
        dtype=given["dtype"],
        device=given["device"],
        threads=given.get("threads"),
        repetitions=given.get("repetitions", 2 if quick else 5),
        time_limit=given["time_limit"],
        memory_limit=given.get("memory_limit"),
        text=text,
        output=given["output"],
        quick=quick,
    )


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
