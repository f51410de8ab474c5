"""What makes a pair of operators, attention and its backward, citizens of PyTorch: all but the kernels themselves.

Every backend has a pair of its own with the same schemas (csrc/torch/library.cpp); `register_rules` gives a pair its
fake kernels, autograd, autocast and vmap. Arguments are passed on as one tuple, since every rule looks at a few of them
only; the positions are named once, below.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import _C, Tensor
from torch._functorch.autograd_function import enable_single_level_autograd_function
from torch.autograd import forward_ad

from sightline.ops.autocast import autocast_dtype

# Positions in the schema of `attention`: query, key, value, then these.
OPTION_TENSORS = slice(3, 12)
OPTION_SCALARS = slice(14, 26)
CAUSAL = 14
ATTN_MASK, SINKS, SCALE, CU_SEQLENS_Q, DROPOUT_SEED = 5, 7, 8, 9, 11
REWEIGHT_POWER = 23
SAVE_FOR_BACKWARD = 26
ROW_STATISTICS = 27

# What attention_backward takes before the option tensors.
BACKWARD_LEADING = 8

_PLAIN_TENSORS = {Tensor: None, torch.nn.Parameter: None}


@dataclass(frozen=True)
class Kernels:
    """What computes a pair of operators on a device type, called past the dispatcher."""

    device_types: tuple[str, ...]
    forward: Callable[..., tuple[Tensor, ...]]
    backward: Callable[..., tuple[Tensor, ...]]

    @functools.cached_property
    def other_keys(self) -> int:
        return _other_keys(self.device_types)


@dataclass(frozen=True)
class Operators:
    """A registered pair, and a function that calls the first of them."""

    attention: Any
    attention_backward: Any
    call: Callable[..., tuple[Tensor, ...]]


def empty_heads(like: Tensor, batch: Any, heads: Any, rows: Any, width: Any) -> Tensor:
    """(B, H, M, W) as a view of (B, M, H, W) memory, as the kernels allocate it."""
    return like.new_empty((batch, rows, heads, width)).transpose(1, 2)


def _attention_fake(*arguments: Any) -> tuple[Tensor, ...]:
    query, _, value = arguments[:3]
    for tensor in arguments[:CAUSAL]:
        if isinstance(tensor, Tensor) and tensor.device != query.device:
            raise RuntimeError(f"options: expected tensors on {query.device}, as query, got one on {tensor.device}")
    batch, heads, rows, _ = query.shape
    width = value.shape[3]

    def nothing(dtype: torch.dtype = torch.float32) -> Tensor:
        return query.new_empty(0, dtype=dtype)

    saves = arguments[SAVE_FOR_BACKWARD]
    reweighted = arguments[REWEIGHT_POWER] > 0
    saved_width = 6 if reweighted else 2
    return (
        empty_heads(query, batch, heads, rows, width),
        query.new_empty((batch, heads, rows), dtype=torch.float32),
        query.new_empty((batch, heads, rows, saved_width), dtype=torch.float32) if saves else nothing(),
        query.new_empty((batch, heads, rows, width), dtype=torch.float32) if saves and reweighted else nothing(),
        nothing(),
        nothing(torch.int64),
        nothing(),
        nothing(torch.int64),
        nothing(),
    )


def _attention_backward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    query, key, value = arguments[2:5]
    attn_mask = arguments[BACKWARD_LEADING + ATTN_MASK - OPTION_TENSORS.start]
    needs_mask, needs_sinks, needs_scale = arguments[-3:]
    heads = query.shape[1]

    def like(tensor: Tensor) -> Tensor:
        return empty_heads(tensor, *tensor.shape)

    return (
        like(query),
        like(key),
        like(value),
        query.new_empty(attn_mask.shape if needs_mask else 0, dtype=torch.float32),
        query.new_empty(heads if needs_sinks else 0, dtype=torch.float32),
        query.new_empty(heads if needs_scale else 0, dtype=torch.float32),
    )


def _other_keys(device_types: tuple[str, ...]) -> int:
    """The bits of all dispatch keys that a plain tensor of these devices does not have."""
    plain = _C.DispatchKeySet(_C.DispatchKey.ADInplaceOrView)
    for device in device_types:
        for prefix in ("", "Autograd", "Autocast"):
            plain = plain | _C.DispatchKeySet(getattr(_C.DispatchKey, prefix + device.upper()))
    return ~plain.raw_repr()


def is_plain_call(kernels: Kernels, arguments: tuple[Any, ...]) -> bool:
    """Whether nothing but autograd stands between these arguments and their kernel.

    No compiler, tracer, profiler, function transform or mode, and only tensors with plain memory of the kernel's
    devices: no subclass, no lazy negation or conjugation, no tensor that stands for zeros or for a batch.
    """
    if (
        torch.compiler.is_compiling()
        or _C._are_functorch_transforms_active()
        or _C._len_torch_dispatch_stack() != 0
        or _C._get_tracing_state() is not None
        or _C._autograd._profiler_enabled()
    ):
        return False
    other_keys = kernels.other_keys
    for value in arguments:
        if isinstance(value, Tensor) and (
            type(value) not in _PLAIN_TENSORS or _C._dispatch_keys(value).raw_repr() & other_keys
        ):
            return False
    return True


def needs_node(arguments: tuple[Any, ...]) -> bool:
    # Inside a forward-mode level the Function is what says that there is no forward-mode derivative.
    return (torch.is_grad_enabled() and _C._any_requires_grad(*arguments)) or forward_ad._current_level >= 0


def _make_functions(attention: Any, attention_backward: Any, kernels: Kernels) -> tuple[Any, Any]:
    """The autograd Functions of a pair. Their first argument is the dispatcher's key set, None in plain calls."""

    def call_backward(*arguments: Any) -> tuple[Tensor, ...]:
        if torch.is_grad_enabled() or not is_plain_call(kernels, arguments):
            return attention_backward(*arguments)
        return kernels.backward(*arguments)

    class Attention(torch.autograd.Function):
        """Forward with the row quantities saved."""

        @staticmethod
        def forward(ctx: Any, keyset: Any, *arguments: Any) -> tuple[Tensor, ...]:
            arguments = (*arguments[:SAVE_FOR_BACKWARD], True, *arguments[SAVE_FOR_BACKWARD + 1 :])
            if keyset is None:
                outputs = kernels.forward(*arguments)
            else:
                with _C._AutoDispatchBelowAutograd():
                    outputs = attention.redispatch(keyset & _C._after_autograd_keyset, *arguments)
            output, _, saved_rows, saved_values = outputs[:4]
            ctx.save_for_backward(*arguments[:3], output, saved_rows, saved_values, *arguments[OPTION_TENSORS])
            ctx.scalars = arguments[OPTION_SCALARS]
            ctx.set_materialize_grads(False)
            ctx.mark_non_differentiable(*outputs[2:])
            return outputs

        @staticmethod
        def backward(ctx: Any, grad_output: Tensor | None, grad_log_normalizer: Tensor | None, *_: Any) -> Any:
            gradients: list[Tensor | None] = [None] * (len(attention._schema.arguments) + 1)
            if grad_output is None and grad_log_normalizer is None:
                return tuple(gradients)
            query, key, value, output, saved_rows, saved_values, *options = ctx.saved_tensors
            wanted = ctx.needs_input_grad[1:]
            of_weights_alone = grad_output is None
            if grad_output is None:
                # The log normaliser does not depend on V: not even a NaN of it may meet the zeros of this gradient.
                grad_output, value, output, saved_values = map(torch.zeros_like, (output, value, output, saved_values))
            results = call_backward(
                grad_output,
                grad_log_normalizer,
                query,
                key,
                value,
                output,
                saved_rows,
                saved_values,
                *options,
                *ctx.scalars,
                wanted[ATTN_MASK],
                wanted[SINKS],
                wanted[SCALE],
            )
            gradients[1:4] = results[:3]
            if of_weights_alone:
                gradients[3] = value
            for position, gradient in zip((ATTN_MASK, SINKS, SCALE), results[3:], strict=True):
                if wanted[position]:
                    gradients[position + 1] = gradient.to(options[position - OPTION_TENSORS.start].dtype)
            return tuple(gradients)

    class AttentionBackward(torch.autograd.Function):
        """Backward as a node of the graph, so that differentiating it again says why it cannot."""

        @staticmethod
        def forward(ctx: Any, keyset: Any, *arguments: Any) -> tuple[Tensor, ...]:
            with _C._AutoDispatchBelowAutograd():
                return attention_backward.redispatch(keyset & _C._after_autograd_keyset, *arguments)

        @staticmethod
        def backward(ctx: Any, *_: Any) -> Any:
            raise NotImplementedError(
                "sightline.attention: second derivatives are not available in the kernels; use backend='reference'"
            )

    return Attention, AttentionBackward


def autograd_rule(operator: Any, function: Any) -> Any:
    # A Function under our own key: torch.library.register_autograd costs four times as much per call.
    def rule(keyset: Any, *arguments: Any) -> tuple[Tensor, ...]:
        if needs_node(arguments):
            if not _C._are_functorch_transforms_active():
                return function.apply(keyset, *arguments)
            # Called at one level of nested transforms, as the built-in operators are: the rest of the levels follow
            # from the dispatcher, not from Function.apply.
            with enable_single_level_autograd_function():
                return super(torch.autograd.Function, function).apply(keyset, *arguments)
        with _C._AutoDispatchBelowAutograd():
            return operator.redispatch(keyset & _C._after_autograd_keyset, *arguments)

    return rule


def autocast_rule(operator: Any, key: Any) -> Any:
    excluded = _C.DispatchKeySet(key)

    def rule(keyset: Any, *arguments: Any) -> tuple[Tensor, ...]:
        dtype = autocast_dtype(arguments[0])
        if dtype is not None:
            arguments = (*(tensor.to(dtype) for tensor in arguments[:3]), *arguments[3:])
        with _C._ExcludeDispatchKeyGuard(excluded):
            return operator(*arguments)

    return rule


def fold(tensor: Any, axis: int | None, size: int) -> Any:
    """Put the mapped axis (or `size` copies) in front of the batch axis and merge the two."""
    if not isinstance(tensor, Tensor):
        return tensor
    moved = tensor.expand(size, *tensor.shape) if axis is None else tensor.movedim(axis, 0)
    return moved.flatten(0, 1)


def _fold_mask(mask: Tensor | None, axis: int | None, size: int, batch: int) -> Tensor | None:
    if mask is None or (axis is None and mask.shape[0] == 1):
        return mask
    batched = mask.expand(size, *mask.shape) if axis is None else mask.movedim(axis, 0)
    return batched.expand(-1, batch, -1, -1, -1).flatten(0, 1)


def map_one_by_one(operator: Any, size: int, in_dims: tuple[Any, ...], arguments: tuple[Any, ...]) -> Any:
    if size == 0:
        raise ValueError("vmap: expected a mapped axis of at least one entry where sinks, scale or documents are given")
    calls = [
        operator(
            *(
                value if axis is None else value.select(axis, index)
                for axis, value in zip(in_dims, arguments, strict=True)
            )
        )
        for index in range(size)
    ]
    return tuple(torch.stack(outputs) for outputs in zip(*calls, strict=True)), (0,) * len(calls[0])


def _vmap_rule(operator: Any, leading: int, is_foldable: Any) -> Any:
    """Mapping over an axis is a larger batch, unless an argument without a batch axis is mapped or hashed by it."""

    def rule(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> Any:
        size = info.batch_size
        options = range(leading, leading + OPTION_TENSORS.stop - OPTION_TENSORS.start)
        mask, sinks, scale, documents, seed = (
            options[position - OPTION_TENSORS.start]
            for position in (ATTN_MASK, SINKS, SCALE, CU_SEQLENS_Q, DROPOUT_SEED)
        )
        slopes = sinks - 1
        unbatched = (slopes, sinks, scale)
        foldable = (
            size > 0
            and all(in_dims[position] is None for position in unbatched)
            and arguments[documents] is None
            and arguments[seed] is None
            and is_foldable(arguments)
        )
        if not foldable:
            return map_one_by_one(operator, size, in_dims, arguments)
        query = 0 if leading == 3 else 2
        batch = _sizes_without(arguments[query], in_dims[query])[0]
        folded = list(arguments)
        for position, (axis, value) in enumerate(zip(in_dims, arguments, strict=True)):
            if position == mask:
                folded[position] = _fold_mask(value, axis, size, batch)
            elif position not in unbatched:
                is_empty = isinstance(value, Tensor) and value.numel() == 0 and value.dim() - (axis is not None) == 1
                folded[position] = value.new_empty(0) if is_empty else fold(value, axis, size)
        outputs = operator(*folded)
        split = tuple(output if output.dim() == 1 else output.unflatten(0, (size, batch)) for output in outputs)
        return split, tuple(None if output.dim() == 1 else 0 for output in outputs)

    return rule


def _sizes_without(tensor: Tensor, axis: int | None) -> list[int]:
    sizes = list(tensor.shape)
    if axis is not None:
        del sizes[axis]
    return sizes


def register_rules(library: torch.library.Library, name: str, kernels: Kernels) -> Operators:
    """Give the operators `sightline::<name>` and `sightline::<name>_backward`, which are defined, their rules."""
    backward_name = f"{name}_backward"
    attention = getattr(torch.ops.sightline, name).default
    attention_backward = getattr(torch.ops.sightline, backward_name).default
    function, backward_function = _make_functions(attention, attention_backward, kernels)

    torch.library.register_fake(f"sightline::{name}", _attention_fake, lib=library)
    torch.library.register_fake(f"sightline::{backward_name}", _attention_backward_fake, lib=library)
    library.impl(name, autograd_rule(attention, function), "Autograd", with_keyset=True)
    library.impl(backward_name, autograd_rule(attention_backward, backward_function), "Autograd", with_keyset=True)
    for key in (_C.DispatchKey.AutocastCPU, _C.DispatchKey.AutocastCUDA):
        library.impl(name, autocast_rule(attention, key), key.name, with_keyset=True)
    torch.library.register_vmap(f"sightline::{name}", _vmap_rule(attention, 3, lambda arguments: True), lib=library)
    torch.library.register_vmap(
        f"sightline::{backward_name}",
        # The gradients of mask, sinks and scale are sums over the batch: mapped, each entry wants its own.
        _vmap_rule(attention_backward, BACKWARD_LEADING, lambda arguments: not any(arguments[-3:])),
        lib=library,
    )

    def call(*arguments: Any) -> tuple[Tensor, ...]:
        """The operator, in plain eager calls without the dispatcher's detour through Python.

        Half of the call overhead is the dispatcher calling Python back with 33 arguments, so the autograd rule is
        applied right here. Everything that wants to see the operator (compilers, transforms, modes) does.
        """
        if not is_plain_call(kernels, arguments[:CAUSAL]):
            return attention(*arguments)
        if needs_node(arguments):
            return function.apply(None, *arguments)
        return kernels.forward(*arguments)

    return Operators(attention, attention_backward, call)
