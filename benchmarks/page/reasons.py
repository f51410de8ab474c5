"""Why targets are not met, in words: by the instruction set that was measured, and by the target's text.

What stands here was found with the parts of attention timed apart, or with a profile, and holds whatever the next run
measures; limits that follow from the results themselves are computed with the targets. A reason is shown only where its
target is not met.
"""

from __future__ import annotations

_TURNS = (
    "the tile unit and the vector units work in turns, and the vector units make the weights: a half of the time and "
    "more with D = 64 (parts of attention)"
)
_TWO_SWEEPS = (
    "two sweeps: all weights are made, kept, read again and sharpened, and of random data no tile can be left out "
    "(tile skipping)"
)
_FLOAT16 = (
    "four products of bfloat16 parts for the scores and three for the values, at twice the rate of multiply-adds in "
    "registers (parts of attention)"
)
_FLOAT32 = "products take 75 % to 90 % of the time at 70 % to 85 % of the registers' rate (parts of attention)"
_MASK = "a mask as large as the scores is read once per head, and where products are fast that takes as long as they do"
_PAGES = (
    "pages of the output: beside this run, filling as much memory with ones took 0.4 us per token at 65,536 and 0.6 to "
    "2 us at 524,288"
)


def _speed(direction: str, dtype: str, weighting: str) -> str:
    return f"{direction}, {dtype}, sightline {weighting}, speed of torch SDPA"


REASONS: dict[str, dict[str, str]] = {
    "amx_bf16": {
        _speed("forward", "bfloat16", "LSSA"): _TURNS,
        _speed("forward", "bfloat16", "Softmax"): _TURNS,
        _speed("forward", "bfloat16", "LSSAR"): _TWO_SWEEPS,
        _speed("forward", "float32", "LSSA"): _FLOAT32,
        _speed("forward", "float32", "Softmax"): _FLOAT32,
        _speed("forward", "float32", "LSSAR"): _TWO_SWEEPS,
        _speed("forward", "float16", "LSSA"): _FLOAT16,
        _speed("forward", "float16", "Softmax"): _FLOAT16,
        _speed("forward", "float16", "LSSAR"): _TWO_SWEEPS,
        **{
            f"causal forward, {dtype}, longest time per token from 4K to 1M relative to the shortest": _PAGES
            for dtype in ("bfloat16", "float32")
        },
        "boolean attn_mask, share of the plain rate": _MASK,
        "float attn_mask, share of the plain rate": _MASK + "; it is transposed too",
    }
}
