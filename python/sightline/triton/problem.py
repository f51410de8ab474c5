"""What one launch is given: sizes and pointers that vary from call to call, and the variant a kernel is compiled for.

Tuples are kernel arguments; their fields keep the names of csrc/core/problem.h. A tensor that was not given is None,
which Triton treats as a compile-time constant. `Variant` is one constexpr: every distinct value is a kernel of its
own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from sightline.triton.weights import WEIGHT_FUNCTIONS


class Heads(NamedTuple):
    """A (batch, head, row, column) tensor whose last axis is contiguous; strides count elements."""

    data: Any
    batch_stride: Any
    head_stride: Any
    row_stride: Any


class Mask(NamedTuple):
    """attn_mask, or its gradient; the stride of a broadcast axis is 0."""

    data: Any
    batch_stride: Any
    head_stride: Any
    row_stride: Any
    key_stride: Any


class Problem(NamedTuple):
    """The inputs of attention. A window side that is unlimited is not read (see Variant)."""

    query: Heads
    key: Heads
    value: Heads
    heads: Any
    key_heads: Any
    queries: Any
    keys: Any
    scale: Any
    scale_per_head: Any  # (H,) fp32
    key_lengths: Any  # (B,) int32 or int64
    key_mask: Any  # (B, N) uint8
    key_mask_batch_stride: Any
    key_mask_key_stride: Any
    visible_prefix: Any  # (B, N + 1) int32: how many keys before j take part; with key_mask only
    visible_counts: Any  # (B, H, M) int32: n_i, with attn_mask only
    inverse_key_norms: Any  # (B, Hk, N) fp32: 1 / |k_j|, with normalize_qk where they are measured beforehand
    mask: Mask
    alibi_slopes: Any  # (H,) fp32
    sinks: Any  # (H,) fp32
    cu_seqlens_q: Any
    cu_seqlens_k: Any
    documents: Any
    search_steps: Any  # halvings that find a document among `documents`
    window_left: Any
    window_right: Any
    softcap: Any
    power: Any
    offset: Any
    exempt_rows: Any
    dropout_seed: Any  # (1,) int64
    dropout_threshold: Any
    dropout_scale: Any  # 1 / (1 - p)


class SavedRows(NamedTuple):
    """The row quantities that backward reads, laid out as in csrc/core/problem.h."""

    rows: Any  # (B, H, M, 2 or 6)
    responses: Any  # (B, H, M, Dv): U of MATH.md section 2


@dataclass(frozen=True)
class Variant:
    """What a kernel is compiled for."""

    head_width: int
    value_width: int
    block_width: int  # head_width rounded up to a power of two of at least 16
    block_value_width: int
    row_tile: int
    key_tile: int
    dtype: str  # "fp32", "fp16" or "bf16"
    function: str  # the weight function: a name of WEIGHT_FUNCTIONS
    length_scale: bool
    normalize_qk: bool
    causal: bool
    window_left: bool
    window_right: bool
    documents: bool
    masked_everywhere: bool  # key_mask or attn_mask: no tile is known to be visible as a whole
    bool_mask: bool
    softcap: bool
    reweight: bool
    whole_power: int  # the power where it is a whole number up to 64, else 0
    dropout: bool
    packed_heads: bool  # a tile holds rows of all query heads of a key head
    saves: bool
    skips: bool  # re-weighting leaves out key tiles whose weights do not count
    descriptors: bool  # keys and values are loaded by tensor descriptors; before a tile is chosen: may be
    specialized: bool  # warps of their own load, multiply and weigh; before a tile is chosen: may be
    safe: bool  # non-finite operands meet only weights that are not 0

    @property
    def shifted(self) -> bool:
        """Whether the weight function takes the row's largest score off."""
        return WEIGHT_FUNCTIONS[self.function].shifted

    @property
    def log_unit(self) -> float:
        """The logarithm of the weight function's unit."""
        return WEIGHT_FUNCTIONS[self.function].log_unit

    @property
    def needs_count(self) -> bool:
        return self.length_scale or self.reweight
