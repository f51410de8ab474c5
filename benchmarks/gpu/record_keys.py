"""Record the queries and keys of the sentence model for skips.py: `PYTHONPATH=benchmarks python -m gpu.record_keys`.

Two heads of every layer on one text, in bfloat16, so that the file stays under a megabyte.
"""

from __future__ import annotations

import torch
from skipping_ratio import recorded_keys

from gpu.skips import RECORDED

HEADS = 2


def main() -> None:
    """Write the file anew."""
    layers = recorded_keys()
    query, key = (torch.cat([layer[place][:, :HEADS] for layer in layers]).bfloat16().contiguous() for place in (1, 2))
    torch.save({"query": query, "key": key}, RECORDED)
    print(f"written: {RECORDED}, {tuple(query.shape)}")


if __name__ == "__main__":
    main()
