"""A whole language model under changing attention: prefill of a prompt and decoding after it, timed apart.

One model serves all rows: the same weights, projections and feed-forward parts, only its attention is exchanged, by
`set_attn_implementation` and `swap_attention`.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import sightline as sl
from sightline.cli.bench_settings import StackShape, WrongArgumentError, first_line
from sightline.cli.corpus import VOCABULARY, Corpus
from sightline.cli.measure import seconds_of, synchronize
from sightline.cli.stack import SEED
from sightline.weighting import Weighting

# A Llama small enough for two processor cores at 16K tokens; its tokens are bytes.
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
WEIGHTINGS: dict[str, Weighting] = {"softmax": sl.Softmax(), "lssa": sl.LSSA(), "lssar": sl.LSSAR()}


@dataclass(frozen=True)
class Times:
    """Seconds of one prefill, and of the decoding steps after it together."""

    prefill: float
    decoding: float


class WholeModel:
    """A causal language model and its prompt tokens.

    Args:
        name: folder or name for `from_pretrained`; None builds a Llama with random weights.
        longest: tokens of the longest prompt with its answer.

    Raises:
        WrongArgumentError: there is no such model, or it is no causal language model.
    """

    def __init__(self, name: str | None, longest: int, dtype: torch.dtype, device: torch.device) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

        self.name = "Llama with random weights, one byte is one token" if name is None else name
        self.device = device
        self._tokenizer: Any = None
        self.model: Any
        if name is None:
            torch.manual_seed(SEED)
            sizes: dict[str, Any] = {**_SIZES, "max_position_embeddings": longest}
            self.model = LlamaForCausalLM(LlamaConfig(**sizes))
        else:
            try:
                self.model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
                self._tokenizer = AutoTokenizer.from_pretrained(name)
            except Exception as error:  # of transformers, its file formats or the model's own code
                raise WrongArgumentError(f"argument --model: cannot load {name}: {first_line(error)}") from None
        self.model.to(device=device, dtype=dtype).eval()
        self._last_logits_only = "logits_to_keep" in inspect.signature(self.model.forward).parameters
        self._swapped = False

    @property
    def shape(self) -> StackShape:
        """The layers and heads of the model."""
        config = self.model.config.get_text_config()
        heads = config.num_attention_heads
        key_heads = getattr(config, "num_key_value_heads", None) or heads
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        return StackShape(config.num_hidden_layers, heads, key_heads, width)

    def parameters(self) -> int:
        """The number of weights."""
        return sum(weights.numel() for weights in self.model.parameters())

    def tokens(self, corpus: Corpus, length: int) -> Tensor:
        """The first `length` tokens of the text, (1, length); a shorter text starts over."""
        if self._tokenizer is None:
            return torch.tensor(list(corpus.context(length)), device=self.device)[None]
        text = corpus.tokens.decode("utf-8", "replace")
        found = torch.tensor(self._tokenizer(text)["input_ids"], device=self.device)
        return found.repeat(-(-length // found.numel()))[None, :length]

    def use(self, row: str) -> None:
        """Give the model the attention of this row: "eager", "sdpa", or a weighting of sightline."""
        if self._swapped:
            sl.restore_attention(self.model)
            self._swapped = False
        if row in WEIGHTINGS:
            sl.swap_attention(self.model, WEIGHTINGS[row])
            self._swapped = True
        else:
            self.model.set_attn_implementation(row)

    def time(self, row: str, tokens: Tensor, new_tokens: int) -> Times:
        """Prefill the prompt, then decode greedily, with the attention of this row."""
        self.use(row)
        options = {"logits_to_keep": 1} if self._last_logits_only else {}
        result: Any = None

        def prefill() -> None:
            nonlocal result
            result = self.model(input_ids=tokens, use_cache=True, **options)

        def decode() -> None:
            nonlocal result
            for _ in range(new_tokens):
                chosen = result.logits[:, -1:].argmax(-1)
                result = self.model(input_ids=chosen, past_key_values=result.past_key_values, use_cache=True)

        with torch.inference_mode():
            first = seconds_of(prefill, self.device)
            rest = seconds_of(decode, self.device)
        synchronize(self.device)
        return Times(first, rest)
