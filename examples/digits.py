"""Scikit-learn's digits: one scan over the grid of patches against two scans with a multiplicative decay.

The one-scan model is `sl.models.LightNetForImageClassification`, non-causal with MD-LRPE. The baseline is the same
model with its recurrence replaced by gated linear attention, whose decay multiplies:
S_t = diag(d_t) S_{t-1} + k_t v_t^T with d_t = sigmoid(key logits) and k_t = 1 - d_t, the gates of HGRN2
(arXiv 2404.07904). A decay depends on the order, so that an image needs a scan from either end, whose outputs add up.
Its scans run in chunks of matrix products in PyTorch, both directions as one batch, LightNet's in sightline's kernel:
the times compare these two implementations as much as the two recurrences. Both models have the same parameters, drawn
from the same seed.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from common import cosine_schedule, environment, finish_line, parser, progress, run, write
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

from sightline.models import LightNetForImageClassification, LightNetImageConfig
from sightline.nn import LightNetAttention
from sightline.position import md_lrpe

CHUNK = 16
BATCH = 64


def decayed_scan(query: Tensor, key_weight: Tensor, value: Tensor, log_decay: Tensor, gain: Tensor) -> Tensor:
    """Causal gated linear attention (B, H, N, Dv) in chunks, whose decays must stay above e^-80."""
    output = torch.empty_like(query[..., :1]).expand(*query.shape[:3], value.shape[3]).clone()
    state = query.new_zeros(*query.shape[:2], query.shape[3], value.shape[3])
    for begin in range(0, query.shape[2], CHUNK):
        part = slice(begin, begin + CHUNK)
        total = log_decay[:, :, part].cumsum(2)
        reading = query[:, :, part] * total.exp()
        weight = key_weight[:, :, part] * gain[:, :, part]
        within = (reading @ (weight * (-total).exp()).transpose(2, 3)).tril()
        output[:, :, part] = reading @ state + within @ value[:, :, part]
        last = total[:, :, -1:]
        state = last.exp().transpose(2, 3) * state + (weight * (last - total).exp()).transpose(2, 3) @ value[:, :, part]
    return output


class TwoScans(nn.Module):
    """The projections of a `LightNetAttention` around two decayed scans, one from either end."""

    def __init__(self, layer: LightNetAttention) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden: Tensor, *, positions: Tensor | None = None, **_: Any) -> Tensor:
        """(B, N, embed_dim) to the same."""
        layer = self.layer
        query = functional.silu(layer.q_proj(hidden)).unflatten(-1, (layer.num_heads, -1)).transpose(1, 2)
        logits = layer.k_proj(hidden).unflatten(-1, (layer.num_heads, -1)).transpose(1, 2)
        value = layer.v_proj(hidden).unflatten(-1, (layer.num_heads, -1)).transpose(1, 2)
        query, logits, gain = md_lrpe(query, logits, positions)
        # Decays from e^-4 to 1: sixteen of the fastest, e^-64 in all, can still be divided out in float32.
        log_decay = functional.logsigmoid(logits).clamp(min=-4.0)
        weight = 1 - log_decay.exp()
        # Both directions as one batch.
        inputs = (torch.cat([part, part.flip(2)]) for part in (query, weight, value, log_decay, gain))
        there, back = decayed_scan(*inputs).chunk(2)
        output = layer.g_norm((there + back.flip(2)).transpose(1, 2)).flatten(2)
        return layer.o_proj(output * layer.g_proj(hidden).sigmoid())


def build(two_scans: bool, seed: int) -> Any:
    """The model, from the same fresh weights either way."""
    torch.manual_seed(seed)
    model = LightNetForImageClassification(
        LightNetImageConfig(
            image_size=8,
            patch_size=2,
            num_channels=1,
            hidden_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_labels=10,
        )
    )
    if two_scans:
        for block in model.model.layers:
            block.attn = TwoScans(block.attn)
    return model


def train(name: str, two_scans: bool, seed: int, steps: int) -> dict[str, float]:
    """Accuracy on the fifth of the images that training leaves out, and seconds per training step."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    held_out, kept = order[: len(order) // 5], order[len(order) // 5 :]
    model = build(two_scans, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = cosine_schedule(optimizer, steps)
    generator, seconds = torch.Generator().manual_seed(seed), []
    for step in range(steps):
        batch = kept[torch.randint(len(kept), (BATCH,), generator=generator)]
        began = time.perf_counter()
        loss = model(images[batch], labels=labels[batch]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        seconds.append(time.perf_counter() - began)
        progress(f"{name}, seed {seed}: step {step + 1}/{steps}, loss {loss.item():.3f}")
    model.eval()
    with torch.no_grad():
        right = (model(images[held_out]).logits.argmax(-1) == labels[held_out]).float().mean().item()
    median = sorted(seconds)[len(seconds) // 2]
    finish_line(f"{name}, seed {seed}: accuracy {right:.4f}, {1000 * median:.1f} ms per step")
    return {"seed": seed, "accuracy": right, "seconds_per_step": median, "parameters": model.num_parameters()}


def arguments_parser() -> argparse.ArgumentParser:
    """The command line; its defaults are those of the committed results."""
    arguments = parser(__doc__.splitlines()[0], steps=1500)
    arguments.add_argument("--seeds", type=int, default=2, help="how many seeds, from --seed on")
    return arguments


def main() -> None:
    arguments = arguments_parser().parse_args()
    torch.set_num_threads(arguments.threads)
    names = {"one scan (LightNet)": False, "two scans (multiplicative decay)": True}
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for seed in range(arguments.seed, arguments.seed + arguments.seeds):
        for name, two_scans in names.items():
            runs[name].append(train(name, two_scans, seed, arguments.steps))

    def draw(axes: Any) -> None:
        for index, key in enumerate(("accuracy", "seconds_per_step")):
            for place, values in enumerate(runs.values()):
                axes[index].scatter([place] * len(values), [value[key] for value in values])
            axes[index].set(ylabel=key.replace("_", " "), xlim=(-0.5, 1.5))
            axes[index].set_xticks(range(len(runs)), list(runs), fontsize=8)

    write(arguments.output, "digits", {**environment(arguments), "runs": runs}, draw, panels=2)


if __name__ == "__main__":
    run(main)
