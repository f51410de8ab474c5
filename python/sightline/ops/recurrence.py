"""The operators `sightline::additive_recurrence` and its backward, and what makes such a pair a citizen of PyTorch.

Kernels and schemas of this pair are native (csrc/torch/recurrence.cpp); `register_recurrence_rules` gives it, and its
sibling of Triton kernels, fake kernels, autograd, autocast and vmap. What every pair needs stands in rules.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import _C, Tensor

from sightline.ops.rules import (
    Kernels,
    autocast_rule,
    autograd_rule,
    empty_heads,
    fold,
    is_plain_call,
    map_one_by_one,
    needs_node,
)

ADDITIVE_RECURRENCE = torch.ops.sightline.additive_recurrence.default
ADDITIVE_RECURRENCE_BACKWARD = torch.ops.sightline.additive_recurrence_backward.default

# Positions in the schema of `additive_recurrence`.
TENSORS = slice(0, 8)
KEY_GAIN, CU_SEQLENS = 3, 5
INITIAL_STATE = slice(6, 8)
SCALARS = slice(8, 10)
OUTPUT_FINAL_STATE = 10
# What the backward takes before these.
BACKWARD_LEADING = 3


def _fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = arguments[:3]
    cu_seqlens = arguments[CU_SEQLENS]
    batch, heads, rows, _ = query.shape
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    channels = (sequences, key.shape[1], key.shape[3])
    wanted = arguments[OUTPUT_FINAL_STATE]
    return (
        empty_heads(query, batch, heads, rows, value.shape[3]),
        query.new_empty(channels if wanted else 0, dtype=torch.float32),
        query.new_empty((*channels, value.shape[3]) if wanted else 0, dtype=torch.float32),
    )


def _backward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    query, key, value, key_gain, _, _, log_normalizer, memory = arguments[BACKWARD_LEADING:][TENSORS]
    needs_gain, needs_state = arguments[BACKWARD_LEADING + SCALARS.stop :]
    if not needs_gain:
        key_gain = None
    if not needs_state:
        log_normalizer = memory = None
    like = [empty_heads(tensor, *tensor.shape) for tensor in (query, key, value)]
    gain = query.new_empty(0, dtype=torch.float32) if key_gain is None else empty_heads(key_gain, *key_gain.shape)
    states = [
        query.new_empty(0 if state is None else state.shape, dtype=torch.float32) for state in (log_normalizer, memory)
    ]
    return (*like, gain, *states)


def _make_functions(operator: Any, backward_operator: Any, kernels: Kernels) -> tuple[Any, Any]:
    """The autograd Functions of a pair. Their first argument is the dispatcher's key set, None in plain calls."""

    def call_backward(*arguments: Any) -> tuple[Tensor, ...]:
        if torch.is_grad_enabled() or not is_plain_call(kernels, arguments):
            return backward_operator(*arguments)
        return kernels.backward(*arguments)

    class AdditiveRecurrence(torch.autograd.Function):
        """Forward, which saves its inputs and nothing else."""

        @staticmethod
        def forward(ctx: Any, keyset: Any, *arguments: Any) -> tuple[Tensor, ...]:
            if keyset is None:
                outputs = kernels.forward(*arguments)
            else:
                with _C._AutoDispatchBelowAutograd():
                    outputs = operator.redispatch(keyset & _C._after_autograd_keyset, *arguments)
            ctx.save_for_backward(*arguments[TENSORS])
            ctx.scalars = arguments[SCALARS]
            ctx.set_materialize_grads(False)
            if not arguments[OUTPUT_FINAL_STATE]:
                ctx.mark_non_differentiable(*outputs[1:])
            return outputs

        @staticmethod
        def backward(
            ctx: Any, grad_output: Tensor | None, grad_log_normalizer: Tensor | None, grad_memory: Tensor | None
        ) -> Any:
            gradients: list[Tensor | None] = [None] * (OUTPUT_FINAL_STATE + 2)
            if grad_output is None and grad_log_normalizer is None and grad_memory is None:
                return tuple(gradients)
            query, _, value, *_ = inputs = ctx.saved_tensors
            if grad_output is None:
                grad_output = query.new_zeros((*query.shape[:3], value.shape[3]))
            wanted = ctx.needs_input_grad[1:]
            needs = (wanted[KEY_GAIN], any(wanted[INITIAL_STATE]))
            results = call_backward(grad_output, grad_log_normalizer, grad_memory, *inputs, *ctx.scalars, *needs)
            gradients[1:4] = results[:3]
            if needs[0]:
                gradients[1 + KEY_GAIN] = results[3]
            if needs[1]:
                gradients[1 + INITIAL_STATE.start : 1 + INITIAL_STATE.stop] = results[4:]
            return tuple(gradients)

    class AdditiveRecurrenceBackward(torch.autograd.Function):
        """Backward as a node of the graph, so that differentiating it again says why it cannot."""

        @staticmethod
        def forward(ctx: Any, keyset: Any, *arguments: Any) -> tuple[Tensor, ...]:
            with _C._AutoDispatchBelowAutograd():
                return backward_operator.redispatch(keyset & _C._after_autograd_keyset, *arguments)

        @staticmethod
        def backward(ctx: Any, *_: Any) -> Any:
            raise NotImplementedError(
                "sightline.additive_recurrence: second derivatives are not available in the kernels; use "
                "backend='reference'"
            )

    return AdditiveRecurrence, AdditiveRecurrenceBackward


def _vmap_rule(operator: Any, cu_seqlens: int) -> Any:
    """Mapping over an axis is a larger batch, unless documents are packed, which want a batch of one."""

    def rule(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> Any:
        size = info.batch_size
        if size == 0 or arguments[cu_seqlens] is not None:
            return map_one_by_one(operator, size, in_dims, arguments)
        outputs = operator(*(fold(value, axis, size) for axis, value in zip(in_dims, arguments, strict=True)))
        split = tuple(output if output.dim() == 1 else output.unflatten(0, (size, -1)) for output in outputs)
        return split, tuple(None if output.dim() == 1 else 0 for output in outputs)

    return rule


def register_recurrence_rules(
    library: torch.library.Library, name: str, kernels: Kernels
) -> Callable[..., tuple[Tensor, ...]]:
    """Give `sightline::<name>` and `sightline::<name>_backward`, which are defined, their rules.

    Returns a function that calls the first of them, past the dispatcher's detour through Python in plain eager calls.
    """
    operator = getattr(torch.ops.sightline, name).default
    backward_operator = getattr(torch.ops.sightline, f"{name}_backward").default
    function, backward_function = _make_functions(operator, backward_operator, kernels)
    for one, fake, node, documents in (
        (operator, _fake, function, CU_SEQLENS),
        (backward_operator, _backward_fake, backward_function, BACKWARD_LEADING + CU_SEQLENS),
    ):
        qualified = one._schema.name
        torch.library.register_fake(qualified, fake, lib=library)
        torch.library.register_vmap(qualified, _vmap_rule(one, documents), lib=library)
        library.impl(qualified, autograd_rule(one, node), "Autograd", with_keyset=True)
    for key in (_C.DispatchKey.AutocastCPU, _C.DispatchKey.AutocastCUDA):
        library.impl(operator._schema.name, autocast_rule(operator, key), key.name, with_keyset=True)

    def call(*arguments: Any) -> tuple[Tensor, ...]:
        if not is_plain_call(kernels, arguments[TENSORS]):
            return operator(*arguments)
        if needs_node(arguments):
            return function.apply(None, *arguments)
        return kernels.forward(*arguments)

    return call


_CPU_KERNEL = _C.DispatchKeySet(_C.DispatchKey.CPU)
_library = torch.library.Library("sightline", "FRAGMENT")
_kernels = Kernels(
    ("cpu",),
    lambda *arguments: ADDITIVE_RECURRENCE.redispatch(_CPU_KERNEL, *arguments),
    lambda *arguments: ADDITIVE_RECURRENCE_BACKWARD.redispatch(_CPU_KERNEL, *arguments),
)

call_recurrence = register_recurrence_rules(_library, "additive_recurrence", _kernels)
