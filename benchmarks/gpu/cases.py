"""What the GPU benchmarks measure: cases by group, in the order of their worth, for time may end before the list does.

Nothing here imports torch: the parent plans and reports with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

TOKENS = 16384  # per call while the context is shorter: enough work to fill the chip at any length
MODEL_WIDTH = 2048  # heads times head width
DECODE_CACHE = 524288  # keys of all caches of a call together
DECODE_HEADS, DECODE_KEY_HEADS = 32, 8

SDPA = ("sdpa-flash", "sdpa-cudnn", "sdpa-efficient", "sdpa-math")
OURS = ("softmax", "lssa", "lssar")
DENSE = (*SDPA, "eager", *OURS)
BACKWARD = (*DENSE, "sdpa-flash-unordered")
FLEX = ("flex-softmax", "flex-lssa", "flash-flex-softmax", "flash-flex-lssa", "softmax", "lssa")
RECURRENCE = ("recurrence", "fla-lightnet")
DECODE = (
    "sdpa-flash",
    "sdpa-cudnn",
    "sdpa-efficient",
    *(f"{kind}-{name}" for kind in ("cuda", "triton") for name in OURS),
)

IN_A_GRAPH = ", CUDA graph"  # after the name of an implementation of decoding


def with_graphs(implementations: Sequence[str]) -> tuple[str, ...]:
    """Every implementation as it is called, and its kernels replayed as a CUDA graph."""
    return tuple(name + ending for name in implementations for ending in ("", IN_A_GRAPH))


LENGTHS = (4096, 16384, 65536, 1024, 2048, 8192, 32768)


@dataclass(frozen=True)
class Case:
    """One shape and direction: "forward", "backward" (alone), "forward+backward" or "decode".

    `operation`: "attention", or "recurrence" for the additive one, whose state has head_dim rows and columns.
    """

    direction: str
    dtype: str
    head_dim: int
    length: int
    causal: bool
    batch: int
    heads: int
    key_heads: int
    operation: str = "attention"

    @property
    def name(self) -> str:
        operation = "" if self.operation == "attention" else f"{self.operation}, "
        shape = f"B = {self.batch}, H = {self.heads}, D = {self.head_dim}, N = {self.length:,}"
        return f"{operation}{self.direction}, {self.dtype}, {shape}{', causal' if self.causal else ''}"


@dataclass(frozen=True)
class Group:
    """Cases measured by one child process, and the implementations that take turns in each."""

    name: str
    cases: tuple[Case, ...]
    implementations: tuple[str, ...]
    limit: float  # seconds

    def key(self, case: Case) -> str:
        """The name of a case among all findings; two groups may measure the same one against other peers."""
        return f"{self.name}: {case.name}"


def dense(direction: str, head_dim: int, length: int, causal: bool, dtype: str = "bfloat16") -> Case:
    """A case of training or prefill: as many keys as queries, every head with keys of its own."""
    heads = MODEL_WIDTH // head_dim
    return Case(direction, dtype, head_dim, length, causal, max(1, TOKENS // length), heads, heads)


def decode(head_dim: int, length: int, batch: int | None = None) -> Case:
    """One new row per sequence against its cache, grouped queries."""
    batch = max(1, DECODE_CACHE // length) if batch is None else batch
    return Case("decode", "bfloat16", head_dim, length, True, batch, DECODE_HEADS, DECODE_KEY_HEADS)


def recurrence(direction: str, length: int) -> Case:
    """The additive recurrence of a LightNet layer, one long sequence."""
    heads = MODEL_WIDTH // 128
    return Case(direction, "bfloat16", 128, length, True, 1, heads, heads, "recurrence")


def _sweep(direction: str, head_dim: int, causal: bool, *lengths: int) -> tuple[Case, ...]:
    return tuple(dense(direction, head_dim, length, causal) for length in lengths)


def groups() -> Iterator[Group]:
    """All groups, the most telling first."""
    yield Group("forward D=128 causal", _sweep("forward", 128, True, *LENGTHS, 131072), DENSE, 60)
    yield Group("backward D=128 causal", _sweep("backward", 128, True, *LENGTHS[:4]), BACKWARD, 60)
    yield Group(
        "decode", (decode(128, 32768), decode(64, 32768), decode(128, 131072, 1), decode(128, 4096)), DECODE, 60
    )
    yield Group("forward D=64 causal", _sweep("forward", 64, True, *LENGTHS, 131072), DENSE, 60)
    yield Group("backward D=64 causal", _sweep("backward", 64, True, *LENGTHS[:4]), BACKWARD, 60)
    flex = (dense(direction, width, 16384, True) for width in (128, 64) for direction in ("forward", "backward"))
    yield Group("FlexAttention causal", tuple(flex), FLEX, 90)
    for width in (128, 64):
        yield Group(f"forward D={width}", _sweep("forward", width, False, *LENGTHS[:4]), DENSE, 60)
        yield Group(f"backward D={width}", _sweep("backward", width, False, *LENGTHS[:3]), BACKWARD, 60)
    whole = tuple(dense("forward+backward", width, length, True) for width in (128, 64) for length in (4096, 16384))
    yield Group("forward+backward causal", whole, BACKWARD, 60)
    lengths = (8192, 16384, 32768, 65536)
    recurrences = (recurrence(direction, length) for direction in ("forward", "forward+backward") for length in lengths)
    yield Group("additive recurrence", tuple(recurrences), RECURRENCE, 60)
    other = tuple(
        dense(direction, 64, 4096, True, dtype)
        for dtype in ("float16", "float32")
        for direction in ("forward", "backward")
    )
    yield Group("other dtypes", other, DENSE, 60)


def find_group(name: str) -> Group:
    """The group of a name.

    Raises:
        ValueError: there is none.
    """
    found = {group.name: group for group in groups()}
    if name not in found:
        raise ValueError(f"name: expected one of {sorted(found)}, got {name!r}")
    return found[name]
