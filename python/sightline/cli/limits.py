"""Which rows of the benchmark would not fit, judged before they run: memory and time from the shape."""

from __future__ import annotations

from sightline.cli.bench_settings import StackShape

_FP32_BYTES = 4
_STREAM_TENSORS = 10  # tensors as wide as the model alive at once inside one layer, measured at about 8


def expected_memory(
    shape: StackShape, tokens: int, item_bytes: int, *, materialises: bool, decode_steps: int = 0
) -> int:
    """Expected peak extra memory of one run in bytes.

    Args:
        shape: the stack.
        tokens: context length N.
        item_bytes: size of one element of the stack's dtype.
        materialises: the row holds scores and weights of all N x N pairs and H heads: scores in the dtype, fp32
            weights (rounded to the dtype once more when it is narrower), and the boolean mask.
        decode_steps: tokens generated after the context; where there are any, every layer keeps its keys and values.

    Example:
        >>> expected_memory(StackShape(), 16384, 4, materialises=True) // 2**30
        16
    """
    stream = max(_STREAM_TENSORS * shape.width, 4 * shape.width + 4 * shape.feed_forward) * tokens * item_bytes
    if decode_steps:
        stream += 2 * shape.layers * shape.kv_heads * shape.head_dim * (tokens + decode_steps) * item_bytes
    if not materialises:
        return stream
    rounded = item_bytes if item_bytes < _FP32_BYTES else 0
    return stream + tokens**2 * (shape.heads * (item_bytes + _FP32_BYTES + rounded) + 1)


def expected_seconds(measured_tokens: int, measured_seconds: float, tokens: int) -> float:
    """Expected time of one run, from a run over a shorter context: attention grows with the square of the length.

    Example:
        >>> expected_seconds(1024, 0.5, 4096)
        8.0
    """
    return measured_seconds * (tokens / measured_tokens) ** 2


def memory_reason(expected: int, limit: int | None) -> str | None:
    """Why a row is skipped for memory, None when it fits. Sizes in bytes."""
    if limit is None or expected <= limit:
        return None
    return f"memory: needs about {format_bytes(expected)}, the limit is {format_bytes(limit)}"


def time_reason(expected: float, limit: float) -> str | None:
    """Why a row is skipped for time, None when it fits. Times in seconds."""
    if expected <= limit:
        return None
    return f"time: one run needs about {expected:.2g} s, the limit is {limit:g} s (--time-limit)"


def format_bytes(size: float) -> str:
    """A size for people, in binary units.

    Example:
        >>> format_bytes(1536 * 2**20)
        '1.50 GiB'
    """
    for unit in ("B", "KiB", "MiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"
