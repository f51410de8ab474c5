"""A byte-level language model of Python's standard library: LightNet against softmax and LSSAR.

Three models of the same number of parameters (within 1 %) see the same batches in the same order. Validation files are
every tenth of the sorted list, which no training batch touches. The score is bits per byte, at the trained context and
at longer ones.
"""

from __future__ import annotations

import argparse
import math
import sysconfig
import time
from pathlib import Path
from typing import Any

import torch
from common import cosine_schedule, environment, finish_line, parser, progress, run, write

import sightline as sl
from sightline.hf import write_settings
from sightline.models import LightNetConfig, LightNetForCausalLM, SightlineLlamaConfig, SightlineLlamaForCausalLM

WIDTH, LAYERS, HEADS, CONTEXT, BATCH = 128, 4, 4, 256, 4
CONTEXTS = (256, 512, 1024, 2048)


def corpus() -> tuple[torch.Tensor, torch.Tensor]:
    """The bytes of training and validation files, each file ended by a zero byte."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(
        path
        for path in folder.rglob("*.py")
        if not {"site-packages", "dist-packages", "test", "tests", "idlelib"} & set(path.relative_to(folder).parts)
    )
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    for index, path in enumerate(files):
        parts[index % 10 == 9].append(path.read_bytes() + b"\0")
    training, validation = (torch.frombuffer(bytearray(b"".join(part)), dtype=torch.uint8) for part in parts)
    return training, validation


def models(seed: int) -> dict[str, Any]:
    """The three models; the width inside Llama's gated linear unit makes up for what LightNet's gate has."""
    torch.manual_seed(seed)
    built = {
        "LightNet": LightNetForCausalLM(
            LightNetConfig(
                vocab_size=256, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS, use_cache=False
            )
        )
    }
    wanted = built["LightNet"].num_parameters()
    for name, weighting in {"softmax": sl.Softmax(), "LSSAR": sl.LSSAR(power=3.0)}.items():
        sizes = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "vocab_size": 256}
        options = {"max_position_embeddings": max(CONTEXTS), "use_cache": False, "sightline": write_settings(weighting)}
        narrow = SightlineLlamaForCausalLM(SightlineLlamaConfig(**sizes, **options, intermediate_size=1))
        inside = 1 + round((wanted - narrow.num_parameters()) / (3 * WIDTH * LAYERS))
        torch.manual_seed(seed)
        config = SightlineLlamaConfig(**sizes, **options, intermediate_size=inside)
        built[name] = SightlineLlamaForCausalLM(config)
        assert abs(built[name].num_parameters() / wanted - 1) < 0.01
    return built


@torch.no_grad()
def bits_per_byte(model: Any, windows: torch.Tensor, context: int) -> float:
    """Mean over windows (count, bytes), cut into windows of this context."""
    model.eval()
    windows = windows.view(-1, context)
    total = sum(float(model(rows, labels=rows).loss) * len(rows) for rows in windows.split(max(1, 4096 // context)))
    return total / len(windows) / math.log(2)


def train(name: str, model: Any, training: torch.Tensor, windows: torch.Tensor, steps: int, seed: int) -> dict:
    """Train, and return the curve and the scores."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = cosine_schedule(optimizer, steps)
    curve, seconds = [], 0.0
    for step in range(steps):
        begins = torch.randint(len(training) - CONTEXT, (BATCH,), generator=generator).tolist()
        rows = torch.stack([training[begin : begin + CONTEXT] for begin in begins]).long()
        began = time.perf_counter()
        model.train()
        loss = model(rows, labels=rows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        seconds += time.perf_counter() - began
        progress(f"{name}: step {step + 1}/{steps}, {loss.item() / math.log(2):.3f} bits per byte")
        if (step + 1) % max(1, steps // 5) == 0:
            curve.append((step + 1, bits_per_byte(model, windows, CONTEXT)))
    scores = {str(context): bits_per_byte(model, windows, context) for context in CONTEXTS}
    finish_line(f"{name}: " + ", ".join(f"{score:.3f} at {context}" for context, score in scores.items()))
    return {"parameters": model.num_parameters(), "curve": curve, "bits_per_byte": scores, "seconds": seconds}


def arguments_parser() -> argparse.ArgumentParser:
    """The command line; its defaults are those of the committed results."""
    arguments = parser(__doc__.splitlines()[0], steps=800)
    arguments.add_argument("--windows", type=int, default=16, help="windows of the longest context to validate on")
    return arguments


def main() -> None:
    arguments = arguments_parser().parse_args()
    torch.set_num_threads(arguments.threads)
    training, validation = corpus()
    # Spread over all validation files.
    longest = max(CONTEXTS)
    begins = torch.linspace(0, len(validation) - longest, arguments.windows).long().tolist()
    windows = torch.stack([validation[begin : begin + longest] for begin in begins]).long()
    runs = {
        name: train(name, model, training, windows, arguments.steps, arguments.seed)
        for name, model in models(arguments.seed).items()
    }
    sizes = {
        "training_bytes": len(training),
        "validation_bytes": windows.numel(),
        "context": CONTEXT,
        "batch": BATCH,
    }
    result = {**environment(arguments), **sizes, "runs": runs}

    def draw(axes: Any) -> None:
        for name, values in runs.items():
            axes[0].plot(*zip(*values["curve"], strict=True), label=name)
            axes[1].plot(CONTEXTS, list(values["bits_per_byte"].values()), marker="o", label=name)
        axes[0].set(xlabel="step", ylabel="bits per byte (validation)", title=f"context {CONTEXT}")
        axes[1].set(xlabel="context in bytes", xscale="log", title=f"after training at {CONTEXT}")
        axes[0].legend()

    write(arguments.output, "byte_language_model", result, draw, panels=2)


if __name__ == "__main__":
    run(main)
