"""The implementations that the GPU benchmarks compare, each a call on query, key and value of a case."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

import sightline as sl
from gpu.cases import Case
from sightline.weighting import Weighting

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]

WEIGHTINGS = {"softmax": sl.Softmax(), "lssa": sl.LSSA(), "lssar": sl.LSSAR()}
_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
# Bytes per pair of query and key that an implementation which holds them all takes, roughly.
_PAIR_BYTES = {"forward": 12, "backward": 28, "forward+backward": 28}
_MEMORY_SHARE = 0.6


def weighting_of(name: str) -> Weighting:
    """What an implementation computes, for its check against the exact weights."""
    return WEIGHTINGS.get(name.rpartition("-")[2], sl.Softmax())


def needs_too_much(name: str, case: Case, free_bytes: int) -> str | None:
    """Why an implementation that holds all pairs is left out of a case; None where it fits, or holds none."""
    if name not in ("eager", "sdpa-math") or case.direction == "decode":
        return None
    need = case.batch * case.heads * case.length**2 * _PAIR_BYTES[case.direction]
    if need <= _MEMORY_SHARE * free_bytes:
        return None
    return f"memory: needs about {need / 2**30:.0f} GiB, {free_bytes / 2**30:.0f} GiB are free"


def make(name: str, case: Case) -> Attention:
    """The implementation of a name for the shape of a case.

    Raises:
        ValueError: there is no implementation of that name.
    """
    family, _, kind = name.partition("-")
    if family == "sdpa":
        return partial(_sdpa, _BACKENDS[kind.partition("-")[0]], case)
    if name == "recurrence":
        return partial(sl.additive_recurrence, backend="triton")
    if name == "fla-lightnet":
        return _fla_lightnet()
    if name == "eager":
        return partial(eager, causal=case.causal)
    if family in ("flex", "flash"):
        return _flex(kind.rpartition("-")[2], case, "FLASH" if family == "flash" else "TRITON")
    backend = {"cuda": "native", "triton": "triton"}.get(family, "triton")
    weighting = WEIGHTINGS.get(kind or family)
    if weighting is None:
        raise ValueError(f"name: expected an implementation, got {name!r}")
    return partial(sl.attention, weighting=weighting, causal=case.causal, backend=backend)


def _fla_lightnet() -> Attention:
    """The recurrence as flash-linear-attention's LightNet layer computes it: normalised keys and decays, chunked."""
    from fla.ops.gla import chunk_gla

    return partial(lightnet_by_gla, chunk_gla)


def lightnet_by_gla(gated: Callable[..., tuple[Tensor, object]], query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The additive recurrence (MATH.md section 4) as a gated one; `gated` takes (B, N, H, D) and log decays `g`."""
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    log_sums = key.float().logcumsumexp(1)
    decays = torch.cat((log_sums[:, :1], log_sums[:, :-1]), 1) - log_sums
    weights = (key - log_sums).exp().to(key.dtype)
    output, _ = gated(q=query, k=weights, v=value, g=decays.to(key.dtype), scale=1.0)
    return output.transpose(1, 2)


def _sdpa(backend: SDPBackend, case: Case, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        # One row sees its whole cache; torch aligns is_causal with the first key.
        causal = case.causal and case.direction != "decode"
        grouped = case.heads != case.key_heads
        return functional.scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=grouped)


def eager(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Tensor:
    """Softmax attention that holds all weights, in the dtype of the inputs but for an fp32 softmax."""
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    if causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(future, -math.inf)
    return scores.softmax(-1, dtype=torch.float32).to(value.dtype) @ value


def lssa_score(length_scale: bool, score: Tensor, batch: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
    """LSSA as a score_mod: the softmax of ln softplus(s) is softplus over its sum (MATH.md section 1).

    `length_scale`: causal, where row i sees i + 1 keys; otherwise ln N stands in the scale already.
    """
    if length_scale:
        score = score * torch.log((row + 1).to(torch.float32))
    return torch.log(functional.softplus(score))


def flex_call(weighting: str, causal: bool, backend: str, block_mask: object) -> Attention:
    """FlexAttention, not compiled yet, on the mathematics of a weighting."""
    from torch.nn.attention.flex_attention import flex_attention

    options = {"BACKEND": backend} if backend != "TRITON" else None
    if weighting == "softmax":
        return partial(flex_attention, block_mask=block_mask, kernel_options=options)
    score_mod = functools.partial(lssa_score, causal)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scale = math.log(query.shape[-1]) * (1.0 if causal else math.log(key.shape[-2]))
        query, key = functional.normalize(query, dim=-1), functional.normalize(key, dim=-1)
        return flex_attention(
            query, key, value, score_mod=score_mod, block_mask=block_mask, scale=scale, kernel_options=options
        )

    return attend


def _flex(weighting: str, case: Case, backend: str) -> Attention:
    from torch.nn.attention.flex_attention import create_block_mask

    def sees(batch: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
        return row >= key

    mask = create_block_mask(sees, None, None, case.length, case.length, device="cuda") if case.causal else None
    return torch.compile(flex_call(weighting, case.causal, backend, mask), dynamic=False)
