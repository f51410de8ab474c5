"""The `sightline` command: `sightline info` says what runs here and why, `sightline bench` how fast it is.

`sightline demo` shows attention swapped inside transformers models.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from sightline.cli import bench_settings, demo_settings
from sightline.cli.environment import installed_version

__all__ = ["main"]

WRONG_INPUT = 2
INTERRUPTED = 130


class _OneLineParser(argparse.ArgumentParser):
    """Reports wrong input in one line: the message already names the argument and the remedy, usage would bury it."""

    def error(self, message: str) -> NoReturn:
        self.exit(WRONG_INPUT, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _OneLineParser(prog="sightline", description="Long-context attention kernels you can see into.")
    parser.add_argument("--version", action="version", version=f"sightline {installed_version('sightline')}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    info = commands.add_parser(
        "info",
        help="versions, instruction sets, backends and why each is or is not available",
        description="Print versions, instruction sets, threads and backends of this installation.",
    )
    info.add_argument("--json", action="store_true", help="print JSON instead of text")

    bench = commands.add_parser(
        "bench",
        help="throughput and memory of attention over context length, beside PyTorch's own",
        description="Run a Llama-shaped stack of attention layers over real text and compare attention "
        "implementations side by side: tokens per second, peak memory, ratio to torch SDPA.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    bench_settings.add_arguments(bench)

    demo = commands.add_parser(
        "demo",
        help="attention swapped inside transformers models: the same embeddings, and throughput of a whole model",
        description="Embed real passages with a trained sentence model before and after swapping its attention, then "
        "run a whole language model with each attention: prefill and decoding, tokens per second, ratio to torch SDPA.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo_settings.add_arguments(demo)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the `sightline` command and return its exit code.

    Args:
        argv: the arguments after the program's name; `sys.argv[1:]` by default.

    Returns:
        0 on success, 1 when a row of `bench` or `demo` failed, 130 after Ctrl-C;
        1 too where the output cannot be written.

    Raises:
        SystemExit: with code 2 and one line on stderr for wrong input, with code 0 after `--help` and `--version`.

    Example:
        >>> from sightline.cli import main
        >>> main(["info"])  # doctest: +ELLIPSIS
        sightline ...
        0
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    parsed = _parser().parse_args(arguments)
    try:
        code = _run(parsed, arguments)
        sys.stdout.flush()
        return code
    except bench_settings.WrongArgumentError as error:
        print(f"sightline {parsed.command}: error: {error}", file=sys.stderr)
        raise SystemExit(WRONG_INPUT) from None
    except KeyboardInterrupt:
        print(f"sightline {parsed.command}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except OSError as error:
        # Nobody reads on (`sightline info | head -1`), which needs no words, or a disk is full, which does.
        _leave_stdout_alone()
        if not isinstance(error, BrokenPipeError):
            print(f"sightline {parsed.command}: error: {error}", file=sys.stderr)
        return 1


def _run(parsed: argparse.Namespace, arguments: list[str]) -> int:
    if parsed.command == "info":
        from sightline.cli import info

        return info.run(as_json=parsed.json)
    if parsed.command == "demo":
        from sightline.cli import demo

        return demo.run(demo_settings.settings_from(parsed), command=["sightline", *arguments])
    from sightline.cli import bench

    return bench.run(bench_settings.request_from(parsed), command=["sightline", *arguments])


def _leave_stdout_alone() -> None:
    """What is still to be written would fail once more when Python ends, with a traceback."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
