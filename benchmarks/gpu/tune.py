"""The child process of a tuning step: `python -m gpu.tune WEIGHTING WIDTH` under SIGHTLINE_AUTOTUNE=1.

Calls forward and backward of one weighting, causal and not; the kernels tune themselves on these calls.
"""

from __future__ import annotations

import argparse

import torch

import sightline as sl
from gpu import cases, measure, peers
from gpu.steps import record
from sightline.triton.tuning import TunedTiles, kernels_fingerprint, target_name, tuning_file
from sightline.weighting import Weighting

LENGTH = 8192


def tune(weighting: Weighting, case: cases.Case, device: torch.device, backend: str = "triton") -> None:
    """One inference, one forward with gradients, and its backward, on the shape of a case."""
    inputs = measure.inputs_of(case, device)
    with torch.inference_mode():
        sl.attention(*inputs, weighting=weighting, causal=case.causal, backend=backend)
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    output = sl.attention(*leaves, weighting=weighting, causal=case.causal, backend=backend)
    torch.autograd.grad(output, leaves, torch.randn_like(output))


def record_tiles() -> None:
    """Hand over every tile that stands in the file, and for which kernels and target it does."""
    written = {"kernels": kernels_fingerprint(), "target": target_name()}
    for name, tile in TunedTiles(tuning_file()).tiles.items():
        record({"kind": "tiles", "name": name, "tile": list(tile), "text": str(tile), **written})


def main() -> None:
    """Tune one weighting and head width."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("weighting", choices=list(peers.WEIGHTINGS))
    parser.add_argument("width", type=int)
    arguments = parser.parse_args()
    for causal in (True, False):
        case = cases.dense("forward", arguments.width, LENGTH, causal)
        tune(peers.WEIGHTINGS[arguments.weighting], case, torch.device("cuda"))
        record_tiles()


if __name__ == "__main__":
    main()
