"""The additive linear recurrence by the formulas of MATH.md, section 4, one position after the other.

The state of a head is (z, S): z = ln Delta per channel, -inf before the first key, and S (Dk x Dv). Both are in the
inputs' dtype, at least float32. What divides by Delta = 0 is selected away before and after, so that its derivative is
zero and not NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

State = tuple[Tensor, Tensor]


def _advance(state: State, key: Tensor, value: Tensor, gain: Tensor | None) -> State:
    """One step: z_t = ln(e^z + e^x), S_t = diag(e^(z - z_t)) S + (e^(x - z_t) gain) v^T."""
    z, memory = state
    largest = torch.maximum(z, key).detach()
    dead = largest == -torch.inf
    largest = torch.where(dead, 0, largest)
    total = (z - largest).exp() + (key - largest).exp()
    new_z = largest + torch.where(dead, 1, total).log()
    decay, weight = (z - new_z).exp(), (key - new_z).exp()
    if gain is not None:
        weight = weight * gain
    memory = decay.unsqueeze(-1) * memory + weight.unsqueeze(-1) * value.unsqueeze(-2)
    return torch.where(dead, -torch.inf, new_z), memory


def _run(
    query: Tensor, key: Tensor, value: Tensor, gain: Tensor | None, state: State, causal: bool
) -> tuple[Tensor, State]:
    """Outputs (B, H, N, Dv), unscaled, and the final state of one sequence per batch entry."""
    key_heads = key.shape[1]
    grouped = query.unflatten(1, (key_heads, query.shape[1] // key_heads))
    rows: list[Tensor] = []
    for t in range(key.shape[2]):
        state = _advance(state, key[:, :, t], value[:, :, t], None if gain is None else gain[:, :, t])
        if causal:
            rows.append(grouped[:, :, :, t] @ state[1])
    output = torch.stack(rows, dim=3) if rows else grouped @ state[1].unsqueeze(2)
    return output.flatten(1, 2), state


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
    initial_state: State | None = None,
) -> tuple[Tensor, State]:
    """``o_t = scale q_t^T S_t`` (B, H, N, Dv) in the query's dtype, and the final state.

    Shapes as in `sightline.additive_recurrence`; the state is the pair (B, Hk, Dk), (B, Hk, Dk, Dv), one entry per
    document instead of per batch entry with `cu_seqlens`.

    >>> import torch
    >>> query, key, value = torch.ones(1, 1, 3, 1), torch.zeros(1, 1, 3, 1), torch.tensor([3.0, 5.0, 1.0])
    >>> output, _ = additive_recurrence(query, key, value.view(1, 1, 3, 1))
    >>> output.flatten().round()  # equal keys: the running mean of the values
    tensor([3., 4., 3.])
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    output_dtype = query.dtype
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    gain = None if key_gain is None else key_gain.to(dtype)
    if key_mask is not None:
        off = ~key_mask[:, None, :, None]
        key, value = key.masked_fill(off, -torch.inf), value.masked_fill(off, 0)
        gain = None if gain is None else gain.masked_fill(off, 0)
    batch, key_heads, length, width = key.shape
    states = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if initial_state is None:
        z = key.new_full((states, key_heads, width), -torch.inf)
        memory = key.new_zeros((states, key_heads, width, value.shape[3]))
    else:
        z, memory = (given.to(dtype, copy=True) for given in initial_state)  # an empty sequence hands them on
    if cu_seqlens is None:
        output, state = _run(query, key, value, gain, (z, memory), causal)
    else:
        output, state = _run_documents(query, key, value, gain, (z, memory), causal, _cuts(cu_seqlens, length))
    return (scale * output).to(output_dtype), state


def _cuts(cu_seqlens: Tensor, length: int) -> list[int]:
    """The offsets, ascending and within the tensor, as the kernels take them."""
    return cu_seqlens.clamp(0, length).cummax(0).values.tolist()


def _run_documents(
    query: Tensor, key: Tensor, value: Tensor, gain: Tensor | None, states: State, causal: bool, cuts: Sequence[int]
) -> tuple[Tensor, State]:
    """Each document by itself; rows outside of all documents give 0."""
    before = query.new_zeros(*query.shape[:2], cuts[0], value.shape[3])
    after = query.new_zeros(*query.shape[:2], query.shape[2] - cuts[-1], value.shape[3])
    outputs, final = [before], []
    for document, (begin, end) in enumerate(pairwise(cuts)):
        own = slice(document, document + 1)
        rows = (slice(None), slice(None), slice(begin, end))
        output, state = _run(
            query[rows],
            key[rows],
            value[rows],
            None if gain is None else gain[rows],
            (states[0][own], states[1][own]),
            causal,
        )
        outputs.append(output)
        final.append(state)
    output = torch.cat([*outputs, after], dim=2)
    if not final:
        # No gradient flows, and autograd is told so: what depends on no input at all has no backward pass.
        given = (query, key, value) if gain is None else (query, key, value, gain)
        return output + sum(tensor[..., :0].sum() for tensor in given), states
    return output, (torch.cat([z for z, _ in final]), torch.cat([memory for _, memory in final]))
