"""The sizes and options of LightNet's models, as transformers stores them."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from sightline._checks import _LARGEST_SCALE, _wrong_type
from sightline._size_checks import check_count, check_divisor, check_flag, check_number
from sightline.nn.lightnet import LightNetAttention, check_widths

_POSITIONS = (None, "lrpe", "tpe")


class _BlocksConfig(PreTrainedConfig):
    """What both models' blocks are made of."""

    num_hidden_layers: int = 12
    num_attention_heads: int = 6
    num_key_value_heads: int | None = None
    key_dim: int | None = None
    intermediate_size: int | None = None
    gate_rank: int | None = None
    gate: str = "sigmoid"
    norm_per_head: bool = True
    position_encoding: str | None = "lrpe"
    recurrence_scale: float = 1.0
    rms_norm_eps: float = 1e-6
    gate_norm_eps: float | None = None
    initializer_range: float = 0.02


class LightNetConfig(_BlocksConfig):
    """Sizes and options of `LightNetModel` and `LightNetForCausalLM`; model type "sightline_lightnet".

    Args:
        vocab_size: number of tokens.
        hidden_size: width of the residual stream.
        num_hidden_layers: number of blocks.
        num_attention_heads: query heads H; values have width hidden_size / H.
        num_key_value_heads: key and value heads Hk, a divisor of H; H by default.
        key_dim: width Dk of a query and key head, that of a value by default.
        intermediate_size: width inside the gated linear unit; 8/3 of hidden_size by default.
        gate_rank: width between the two projections of the output gate; that of a head by default.
        gate: "sigmoid" or "swish".
        norm_per_head: the recurrence's output is normalised over each head (True) or over all heads together.
        position_encoding: "lrpe", rotated queries and keys, which doubles their width; None, no positions.
        recurrence_scale: multiplies the recurrence's output.
        rms_norm_eps: what the norms of the residual stream add to the mean square.
        gate_norm_eps: the same for the norm in front of the gate; rms_norm_eps by default.
        initializer_range: standard deviation of fresh weights; projections back into the residual stream get it
            divided by sqrt(2 num_hidden_layers).

    Raises:
        TypeError: an argument has the wrong type; the message names it.
        ValueError: sizes below 1 or that do not divide each other, unknown options, a pad_token_id outside the
            vocabulary, or heads wider than the recurrence takes: 512, and 256 for key_dim with "lrpe".

    Source: "You Only Scan Once: Efficient Multi-dimension Sequential Modeling with LightNet", arXiv 2405.21022.

    >>> LightNetConfig(hidden_size=96, num_attention_heads=4).intermediate_size
    256
    """

    model_type = "sightline_lightnet"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 (a name and type that transformers reads)

    vocab_size: int = 32000
    hidden_size: int = 768
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        check_count("vocab_size", self.vocab_size)
        _check_padding(self.pad_token_id, self.vocab_size)
        _complete(self)
        if self.position_encoding not in _POSITIONS[:2]:
            raise ValueError(f"position_encoding: expected None or 'lrpe', got {self.position_encoding!r}")
        super().__post_init__(**kwargs)


class LightNetImageConfig(_BlocksConfig):
    """Sizes and options of `LightNetForImageClassification`; model type "sightline_lightnet_image".

    Args:
        image_size: height and width of an image in pixels, a number or a pair.
        patch_size: height and width of a patch in pixels, a number or a pair; divides image_size.
        num_channels: channels of an image.
        pooling: "mean" over the patches, or "class", a learned token in front of them.
        position_encoding: "lrpe", MD-LRPE in every layer; "tpe", MD-TPE of the patches before the first; or None.
        num_labels: number of classes (transformers' own option).

    The other arguments are those of `LightNetConfig`.

    Raises:
        TypeError: an argument has the wrong type; the message names it.
        ValueError: sizes below 1 or that do not divide each other, unknown options, or heads wider than the recurrence
            takes: 512, and 256 for key_dim with "lrpe".

    >>> LightNetImageConfig(image_size=(16, 32), patch_size=8).grid_size
    (2, 4)
    """

    model_type = "sightline_lightnet_image"

    image_size: int | list[int] | tuple[int, ...] = 224
    patch_size: int | list[int] | tuple[int, ...] = 16
    num_channels: int = 3
    pooling: str = "mean"
    hidden_size: int = 192

    def __post_init__(self, **kwargs: Any) -> None:
        check_count("num_channels", self.num_channels)
        _complete(self)
        if self.position_encoding not in _POSITIONS:
            raise ValueError(f"position_encoding: expected None, 'lrpe' or 'tpe', got {self.position_encoding!r}")
        if self.pooling not in ("mean", "class"):
            raise ValueError(f"pooling: expected 'mean' or 'class', got {self.pooling!r}")
        image, patch = _pair("image_size", self.image_size), _pair("patch_size", self.patch_size)
        if image[0] % patch[0] != 0 or image[1] % patch[1] != 0:
            raise ValueError(f"patch_size: expected a divisor of image_size = {image}, got {patch}")
        super().__post_init__(**kwargs)
        check_count("num_labels", self.num_labels)

    @property
    def patch_shape(self) -> tuple[int, int]:
        """Height and width of a patch in pixels."""
        return _pair("patch_size", self.patch_size)

    @property
    def grid_size(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        image, patch = _pair("image_size", self.image_size), self.patch_shape
        return image[0] // patch[0], image[1] // patch[1]


def attention_options(config: LightNetConfig | LightNetImageConfig) -> dict[str, Any]:
    """The arguments of `sightline.nn.LightNetAttention` that a config stands for, but for causality and positions."""
    return {
        "num_key_heads": config.num_key_value_heads,
        "key_dim": config.key_dim,
        "gate_rank": config.gate_rank,
        "gate": config.gate,
        "norm_per_head": config.norm_per_head,
        "norm_eps": config.rms_norm_eps,
        "scale": config.recurrence_scale,
    }


def _complete(config: LightNetConfig | LightNetImageConfig) -> None:
    """Fill in what follows from other options and check that sizes fit, in the words of the config's own names."""
    for name in ("hidden_size", "num_hidden_layers"):
        check_count(name, getattr(config, name))
    width, heads = config.hidden_size, config.num_attention_heads
    check_divisor("num_attention_heads", heads, "hidden_size", width)
    if config.num_key_value_heads is None:
        config.num_key_value_heads = heads
    check_divisor("num_key_value_heads", config.num_key_value_heads, "num_attention_heads", heads)
    doubled_by = "position_encoding 'lrpe'" if config.position_encoding == "lrpe" else None
    check_widths("hidden_size", width, "num_attention_heads", heads, config.key_dim, doubled_by)
    if config.key_dim is None:
        config.key_dim = width // heads
    if config.gate_rank is None:
        config.gate_rank = width // heads
    if config.intermediate_size is None:
        config.intermediate_size = -(-8 * width // 3)
    for name in ("gate_rank", "intermediate_size"):
        check_count(name, getattr(config, name))
    check_number("rms_norm_eps", config.rms_norm_eps)
    if config.gate_norm_eps is None:
        config.gate_norm_eps = config.rms_norm_eps
    for name in ("gate_norm_eps", "initializer_range"):
        check_number(name, getattr(config, name))
    check_number("recurrence_scale", config.recurrence_scale, -_LARGEST_SCALE)
    check_flag("norm_per_head", config.norm_per_head)
    if config.gate not in LightNetAttention.GATES:
        raise ValueError(f"gate: expected one of {', '.join(LightNetAttention.GATES)}, got {config.gate!r}")


def _check_padding(token: Any, vocab_size: int) -> None:
    """What `torch.nn.Embedding` takes: a negative index counts from the end of the vocabulary."""
    if token is None:
        return
    if isinstance(token, bool) or not isinstance(token, int):
        raise _wrong_type("pad_token_id", "None or a whole number", token)
    if not -vocab_size <= token < vocab_size:
        bound = f"below vocab_size = {vocab_size}" if token > 0 else f"from -vocab_size = {-vocab_size}"
        raise ValueError(f"pad_token_id: expected None or a number {bound}, got {token}")


def _pair(name: str, size: Any) -> tuple[int, int]:
    pair = tuple(size) if isinstance(size, (tuple, list)) else (size, size)
    expected = "a number of pixels or a pair of them"
    if any(isinstance(side, bool) or not isinstance(side, int) for side in pair):
        raise TypeError(f"{name}: expected {expected}, got {size!r}")
    if len(pair) != 2 or min(pair) < 1:
        raise ValueError(f"{name}: expected {expected}, got {size!r}")
    return pair
