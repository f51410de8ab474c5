"""A padded batch of long sequences as a call whose memory can be measured in a process of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LlamaConfig, LlamaModel

import sightline as sl


@dataclass(frozen=True)
class PaddedForward:
    """One forward pass of a tiny Llama over `length` tokens, two entries, the first half of one of them padding."""

    length: int

    def prepare(self) -> Callable[[], Any]:
        """Build the swapped model, run it once on a few tokens, and return the call."""
        torch.set_num_threads(1)
        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        model = sl.swap_attention(LlamaModel(LlamaConfig(vocab_size=50, **sizes)), sl.LSSA()).eval()

        def forward(length: int) -> Any:
            mask = torch.ones(2, length, dtype=torch.long)
            mask[0, : length // 2] = 0
            with torch.inference_mode():
                return model(torch.zeros_like(mask), attention_mask=mask, use_cache=False).last_hidden_state

        forward(8)
        return lambda: forward(self.length)
