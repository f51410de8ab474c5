"""Decoding, `sightline::attention_decode`: when it can be used, and the Python half of the operator.

It computes few query rows against many keys, without gradients. On CUDA it is the one native kernel; on the CPU
`sightline::attention` would call the same kernels, but half of the time of a short call goes into its many arguments
and results.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import _C, Tensor
from torch.autograd import forward_ad

from sightline.ops.backends import requested_backend
from sightline.ops.library import cuda_architectures, cuda_library, native_library, runs_on
from sightline.ops.rules import Kernels, is_plain_call, needs_node

# A block of the kernel takes 16 rows of a key head; with more blocks the keys are read again for each.
MOST_ROWS = 16
WIDEST_HEAD = 256
_MOST_BLOCKS = 65535
_MOST_KEYS = 2**31 - 65
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _no_backward(*_: Any) -> tuple[Tensor, ...]:
    raise NotImplementedError("sightline::attention_decode has no derivative")


# Constants to torch.compile: tracing must not look at the file system.
_LOADED = cuda_library().loaded
_REASON = cuda_library().reason
_ARCHITECTURES = tuple(cuda_architectures())
_USABLE = native_library().loaded and not native_library().misconfigured


if native_library().loaded:
    _DECODE = torch.ops.sightline.attention_decode.default
    _CPU_KERNEL = _C.DispatchKeySet(_C.DispatchKey.CPU)
    _cpu_kernels = Kernels(("cpu",), lambda *arguments: _DECODE.redispatch(_CPU_KERNEL, *arguments), _no_backward)


def takes_decode_shortcut(query: Tensor, key: Tensor, *others: Any) -> bool:
    """Whether a call of `sightline.attention` on the CPU without mask, dropout and documents may skip its operator.

    others: value and options. True for few rows in a plain eager call that wants no derivative.
    """
    arguments = (query, key, *others)
    # Sizes last: compilers would guard on them.
    return (
        is_plain_call(_cpu_kernels, arguments)
        and query.shape[1] * query.shape[2] <= MOST_ROWS * key.shape[1]
        and not needs_node(arguments)
    )


def decode_token(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_lengths: Tensor | None,
    key_mask: Tensor | None,
    sinks: Tensor | None,
    *scalars: Any,
) -> Tensor | None:
    """Attention of one unchecked query row per batch entry on the CPU, (B, H, 1, Dv); None where it takes more.

    A model asks for this once per layer and token, after its weights have driven all else out of the caches: every line
    that need not run counts. `scalars` as in the schema of `sightline::attention_decode`, from `causal` on.
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or not (_USABLE and query.is_cpu and query.shape[2] == 1)
        or not query.dtype == key.dtype == value.dtype
        or query.dtype not in _DTYPES
        or torch.is_autocast_enabled("cpu")
        or needs_node((query, key, value, sinks))
        or requested_backend("auto") not in ("auto", "native")
    ):
        return None
    # By the dispatcher, which knows modes, tracers and profilers: asking for them here would cost more.
    output: Tensor = _DECODE(query, key, value, key_lengths, key_mask, None, sinks, None, *scalars)[0]
    return output


def decode_refusal(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    cu_seqlens_q: Tensor | None = None,
    others: tuple[Any, ...] = (),
) -> str | None:
    """Why the CUDA decoding kernel cannot compute this call of `sightline.attention`; None where it can.

    The arguments are those of `sightline.attention`, already checked; `others`: further tensors that may need a
    gradient. This is the one place that knows what the kernel takes.
    """
    if not _LOADED:
        return _REASON
    if query.device.type != "cuda":
        return f"it runs on CUDA devices, not on {query.device.type!r}"
    if not _runs_on_device(query.device.index):
        return f"libsightline_cuda.so was not built for the GPU {query.device}"
    if query.dtype not in _DTYPES:
        return f"it has no kernel for {query.dtype}"
    for name, given in (
        ("attn_mask", attn_mask is not None),
        ("dropout_p", dropout_p > 0.0),
        ("cu_seqlens_q", cu_seqlens_q is not None),
    ):
        if given:
            return f"it does not take {name}"
    batch, heads, queries, width = query.shape
    key_heads, keys = key.shape[1], key.shape[2]
    rows = heads // key_heads * queries
    if rows > MOST_ROWS:
        return f"it takes at most {MOST_ROWS} query rows per key head, this call has {rows}"
    if max(width, value.shape[3]) > WIDEST_HEAD or min(width, value.shape[3]) < 1:
        return f"it takes head widths from 1 to {WIDEST_HEAD}"
    if batch > _MOST_BLOCKS or key_heads > _MOST_BLOCKS or keys > _MOST_KEYS:
        return "it takes at most 65535 batch entries and key heads, and fewer than 2^31 keys"
    if not torch.compiler.is_compiling() and (forward_ad._current_level >= 0 or _C._are_functorch_transforms_active()):
        return "it has no derivative and no rule for function transforms"
    tensors = (query, key, value, *(other for other in others if isinstance(other, Tensor)))
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return "it has no derivative"
    return None


def _runs_on_device(index: int) -> bool:
    properties = torch.cuda.get_device_properties(index)  # a constant to torch.compile
    return runs_on(_ARCHITECTURES, (properties.major, properties.minor))


def call_attention_decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_lengths: Tensor | None,
    key_mask: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    scale_per_head: Tensor | None,
    *scalars: Any,
) -> tuple[Tensor, Tensor]:
    """Output (B, H, M, Dv) and log normaliser (B, H, M). `scalars` as in the schema, from `causal` on."""
    if query.device.type == "cpu":
        output, log_normalizer = _cpu_kernels.forward(
            query, key, value, key_lengths, key_mask, alibi_slopes, sinks, scale_per_head, *scalars
        )
        return output, log_normalizer
    per_head = (None if tensor is None else tensor.float() for tensor in (alibi_slopes, sinks, scale_per_head))
    return _DECODE(query, key, value, key_lengths, key_mask, *per_head, *scalars)


def attention_decode_fake(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    """Shapes and strides of what the operator returns."""
    batch, heads, queries, _width = query.shape
    output = query.new_empty((batch, queries, heads, value.shape[3])).transpose(1, 2)
    return output, query.new_empty((batch, heads, queries), dtype=torch.float32)


if native_library().loaded:
    torch.library.register_fake("sightline::attention_decode")(attention_decode_fake)
