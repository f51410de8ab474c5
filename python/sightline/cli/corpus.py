"""Real text for the benchmark, and its tokens: the bytes of its UTF-8 encoding, a vocabulary of 256."""

from __future__ import annotations

import ast
import os
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

VOCABULARY = 256
_WITHOUT_DOCUMENTATION = {"__pycache__", "site-packages", "dist-packages", "test", "tests"}


@dataclass(frozen=True)
class Corpus:
    """A text as tokens: where it comes from and its first bytes, never empty."""

    source: str
    tokens: bytes

    def context(self, length: int) -> bytes:
        """The first `length` tokens; a shorter text starts over as often as it takes.

        Example:
            >>> Corpus("three letters", b"abc").context(5)
            b'abcab'
        """
        return (self.tokens * self.repeats(length))[:length]

    def repeats(self, length: int) -> int:
        """How many times the text is needed to fill `length` tokens.

        Example:
            >>> Corpus("three letters", b"abc").repeats(5)
            2
        """
        return -(-length // len(self.tokens))


def read_corpus(path: Path | None, length: int) -> Corpus:
    """Read up to `length` tokens of a file, or of the standard library's documentation when path is None.

    Raises:
        OSError: the file cannot be read.
        ValueError: there is no text.
    """
    if path is None:
        source, tokens = "documentation strings of the Python standard library", _documentation(length)
        remedy = ": this Python carries no library sources, give a text with --text FILE"
    else:
        source, remedy = str(path), ""
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size  # 0 of a pipe
            tokens = file.read(min(length, size) if size else length)
    if not tokens:
        raise ValueError(f"expected text, but {source} is empty{remedy}")
    return Corpus(source, tokens)


def _documentation(length: int) -> bytes:
    collected = bytearray()
    for docstring in documentation_strings(Path(sysconfig.get_paths()["stdlib"])):
        collected += docstring.encode("utf-8", "replace") + b"\n\n"
        if len(collected) >= length:
            break
    return bytes(collected[:length])


def documentation_strings(root: Path) -> Iterator[str]:
    """Docstrings of all modules, classes and functions under a folder of sources, files by path, then in source order.

    The sources are parsed, never imported; files that do not parse are passed over.
    """
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for path in sorted(root.rglob("*.py")):
        if _WITHOUT_DOCUMENTATION.intersection(path.relative_to(root).parts):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # invalid escapes in sources that are not ours
                tree = ast.parse(path.read_bytes())
        except (OSError, SyntaxError, ValueError):
            continue
        nodes = [node for node in ast.walk(tree) if isinstance(node, documented)]
        for node in sorted(nodes, key=lambda node: getattr(node, "lineno", 0)):
            docstring = ast.get_docstring(node)
            if docstring:
                yield docstring
