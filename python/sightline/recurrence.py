"""`sightline.additive_recurrence`, the linear recurrence of LightNet, and its state."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sightline import reference
from sightline._recurrence_checks import check_recurrence
from sightline.ops import choose_recurrence_backend, native_library
from sightline.ops.autocast import autocast_dtype, without_autocast

if native_library().loaded:
    from sightline.ops.recurrence import call_recurrence
    from sightline.ops.triton_recurrence import call_recurrence_triton


class RecurrenceState(NamedTuple):
    """What an additive recurrence knows of the keys and values it has seen: of constant size.

    log_normalizer: (B, Hk, Dk), ln Delta per channel in nats; -inf before the first key.
    memory: (B, Hk, Dk, Dv), S. With packed documents the first axis of both is that of the documents.

    Both are float64 with a float64 query, else float32. What follows is about float32.

    A call computes with more bits than this, and rounds once at its end. So what the state cannot hold depends on the
    number of calls, not of positions: above ln 3000 = 8 a float32 logarithm resolves a millionth of Delta, and a call
    whose keys add less than half of that leaves it as it was. With normal keys, one position per call, the memory of 64
    channels was off by 1e-5 after 10,000 calls, 2e-4 after 300,000, 4e-3 after a million and 8e-2 after three million.
    An offset common to all keys, which one call does not notice, makes that coarser: with keys of mean 100 it was off
    by 9e-5 after 10,000 calls.

    >>> import torch
    >>> import sightline as sl
    >>> query = key = value = torch.randn(1, 2, 6, 8)
    >>> _, state = sl.additive_recurrence(query, key, value, output_final_state=True)
    >>> state.log_normalizer.shape, state.memory.shape
    (torch.Size([1, 2, 8]), torch.Size([1, 2, 8, 8]))
    """

    log_normalizer: Tensor
    memory: Tensor


# Two tensors: nothing that torch.load(weights_only=True), its default, has to refuse.
torch.serialization.add_safe_globals([RecurrenceState])


def additive_recurrence(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool = True,
    scale: float = 1.0,
    key_gain: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    key_mask: Tensor | None = None,
    initial_state: RecurrenceState | tuple[Tensor, Tensor] | None = None,
    output_final_state: bool = False,
    backend: str = "auto",
) -> Any:
    r"""The additive linear recurrence of LightNet: time linear in N, a state of constant size.

    Per head, with the raw key logits x_t,

        ``Delta_t = Delta_{t-1} + exp(x_t)``
        ``S_t = diag(Delta_{t-1} / Delta_t) S_{t-1} + (exp(x_t) / Delta_t * gain_t) v_t^T``
        ``o_t = scale * q_t^T S_t``

    so that row d of S_t is the average of the values so far, weighted by the softmax of the keys' channel d. Without
    `causal` every row reads the state of the whole sequence: one scan in any order, for images and other grids.

    Args:
        query: (B, H, N, Dk) in float32, float16 or bfloat16 (float64 is computed by the reference); Dk from 1 to 512.
        key: (B, Hk, N, Dk), logits. H must be a multiple of Hk: query head h reads key head ``h // (H / Hk)``.
        value: (B, Hk, N, Dv); Dv from 1 to 512. The CPU kernels keep sums of values with weights of up to e^20: N times
            the largest value has to stay below 7e29, or outputs are not finite.
        causal: row t reads the positions up to t, else all.
        scale: a number that multiplies the output.
        key_gain: (B, Hk, N, Dk) in the query's dtype or float32, of any sign: multiplies the weight of a key after the
            normalisation. Position encodings act through it.
        cu_seqlens: (documents + 1,) int32 offsets of documents packed into one batch entry (B = 1); each has a state of
            its own. Rows outside of all documents give 0.
        key_mask: (B, N) bool, True where a key takes part.
        initial_state: the state to go on from, float32 (float64 with a float64 query); None: no key yet, so that the
            first key has weight 1. (Later code of LightNet's authors starts from Delta_0 = 1, a state of zeros.)
        output_final_state: also return the state after the last position.
        backend: "auto", "native", "triton" or "reference"; SIGHTLINE_BACKEND overrides "auto".

    Returns:
        (B, H, N, Dv) in the query's dtype, a view of (B, N, H, Dv) memory; 0 before the first key that takes part. With
        `output_final_state` the pair of it and a `RecurrenceState`. Both carry gradients, to the initial state too.
        Running [a; b] equals running a, then b from the state of a, to what that state resolves (`RecurrenceState`).

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape or value; the message names it.
        NotImplementedError: the backend does not have this.

    Source: "You Only Scan Once: Efficient Multi-dimension Sequential Modeling with LightNet", arXiv 2405.21022;
    docs/MATH.md section 4.

    >>> import torch
    >>> import sightline as sl
    >>> query, key, value = torch.randn(1, 8, 16, 64), torch.randn(1, 2, 16, 64), torch.randn(1, 2, 16, 32)
    >>> output, state = sl.additive_recurrence(query, key, value, output_final_state=True)
    >>> output.shape
    torch.Size([1, 8, 16, 32])
    >>> sl.additive_recurrence(query, key, value, initial_state=state).shape  # the next 16 positions
    torch.Size([1, 8, 16, 32])
    """
    autocast = autocast_dtype(query) if isinstance(query, Tensor) else None
    check_recurrence(
        query,
        key,
        value,
        causal=causal,
        scale=scale,
        key_gain=key_gain,
        cu_seqlens=cu_seqlens,
        key_mask=key_mask,
        initial_state=initial_state,
        output_final_state=output_final_state,
        backend=backend,
        autocast_dtype=autocast,
    )
    if autocast is not None:
        query, key, value = query.to(autocast), key.to(autocast), value.to(autocast)
    initial_z, initial_memory = (None, None) if initial_state is None else initial_state
    chosen = choose_recurrence_backend(query, backend)
    if chosen != "reference":
        call = call_recurrence if chosen == "native" else call_recurrence_triton
        output, log_normalizer, memory = call(
            query,
            key,
            value,
            key_gain,
            key_mask,
            cu_seqlens,
            initial_z,
            initial_memory,
            causal,
            float(scale),
            output_final_state,
        )
    else:
        with without_autocast(query.device):
            output, (log_normalizer, memory) = reference.additive_recurrence(
                query,
                key,
                value,
                causal=causal,
                scale=scale,
                key_gain=key_gain,
                cu_seqlens=cu_seqlens,
                key_mask=key_mask,
                initial_state=None if initial_state is None else (initial_state[0], initial_state[1]),
            )
        output = output.transpose(1, 2).contiguous().transpose(1, 2)
    if not output_final_state:
        return output
    return output, RecurrenceState(log_normalizer, memory)
