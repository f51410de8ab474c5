"""The cache of LightNet's models: one recurrent state per layer, of a size that does not depend on the context."""

from __future__ import annotations

from typing import Any, NoReturn, cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from sightline._size_checks import check_count
from sightline.recurrence import RecurrenceState


class RecurrenceCacheLayer(CacheLayerMixin):
    """The state of one layer and the number of tokens that went into it."""

    is_compileable = False
    is_croppable = False
    supports_early_init = False

    def __init__(self) -> None:
        super().__init__()
        self.state: RecurrenceState | None = None
        self.length = 0
        self._home: torch.device | None = None  # where the state was when it was offloaded

    def __deepcopy__(self, memo: dict[int, Any]) -> RecurrenceCacheLayer:
        """A layer with a state of its own, cut from its history: torch copies no tensor that has one."""
        layer = type(self)()
        if self.state is not None:
            layer.store(RecurrenceState(*(tensor.detach().clone() for tensor in self.state)), self.length)
        layer._home = self._home
        return layer

    def store(self, state: RecurrenceState, tokens: int) -> None:
        """Take the state after `tokens` further tokens."""
        self.state, self.length = state, self.length + tokens
        self.is_initialized = True

    def lazy_initialization(self, *args: Any) -> None:
        """There is nothing to allocate ahead: the first state comes from the first tokens."""

    def update(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raises NotImplementedError: there are no keys and values to keep."""
        raise NotImplementedError("RecurrenceCache holds states of a recurrence; a layer with keys cannot use it")

    def get_seq_length(self) -> int:
        """Tokens seen."""
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of a mask over all tokens so far and the next `query_length`."""
        return self.length + query_length, 0

    def get_max_length(self) -> int:
        """-1: there is no limit."""
        return -1

    # The name that transformers before 5.10 asks for.
    get_max_cache_shape = get_max_length

    def reset(self) -> None:
        """Forget all tokens."""
        self.state, self.length, self.is_initialized = None, 0, False

    def crop(self, *args: Any) -> NoReturn:
        """Raises NotImplementedError: a state does not know which part of it came from which token."""
        raise NotImplementedError(
            "crop: a recurrent state cannot give back tokens, which assisted decoding and prompt lookup need; "
            "keep a copy of the cache (copy.deepcopy) from before them"
        )

    def activate_past_recording(self) -> NoReturn:
        """Raises NotImplementedError, as `crop` would later."""
        self.crop()

    def offload(self) -> None:
        """Move the state to the CPU."""
        if self.state is not None:
            self._home = self.state.memory.device
        self._apply(lambda tensor: tensor.to("cpu"))

    def prefetch(self) -> None:
        """Move an offloaded state back to its device."""
        self._apply(lambda tensor: tensor if self._home is None else tensor.to(self._home))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Give every beam the state of the beam that it continues."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these batch entries, in this order."""
        self._apply(lambda tensor: tensor.index_select(0, indices.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every batch entry."""
        self._apply(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def _apply(self, change: Any) -> None:
        if self.state is not None:
            self.state = RecurrenceState(*(change(tensor) for tensor in self.state))


class RecurrenceCache(Cache):
    """What `LightNetForCausalLM` keeps of the tokens so far: (B, Hk, Dk) and (B, Hk, Dk, Dv) per layer.

    They are float32, or float64 in a float64 model. The memory is the same after ten tokens and after a million. It is
    what the model returns as `past_key_values`, what it takes to go on, and what generate() uses. It cannot be cropped.
    `copy.deepcopy` keeps a state to return to, cut from its history.

    Raises TypeError or ValueError for a number of layers that is not a whole number of at least 1.

    >>> cache = RecurrenceCache(12)
    >>> len(cache), cache.get_seq_length(), cache.nbytes
    (12, 0, 0)
    """

    def __init__(self, num_layers: int) -> None:
        check_count("num_layers", num_layers)
        super().__init__(layers=[RecurrenceCacheLayer() for _ in range(num_layers)])

    def layer(self, index: int) -> RecurrenceCacheLayer:
        """What is kept of a layer."""
        return cast(RecurrenceCacheLayer, self.layers[index])

    @property
    def nbytes(self) -> int:
        """Bytes of all states."""
        states = [self.layer(index).state for index in range(len(self.layers))]
        return sum(tensor.nbytes for state in states if state is not None for tensor in state)

    def detach(self) -> RecurrenceCache:
        """A cache with the same states, cut from their history: for training in pieces (truncated backpropagation)."""
        other = RecurrenceCache(len(self.layers))
        for index in range(len(self.layers)):
            layer, copy = self.layer(index), other.layer(index)
            if layer.state is not None:
                copy.store(RecurrenceState(*(tensor.detach() for tensor in layer.state)), layer.length)
        return other
