"""Checkpoints of flash-linear-attention's LightNet as `LightNetForCausalLM`.

Facts of that layout (fla/layers/lightnet.py, fla/models/lightnet, version 0.6): the gate is swish, the norm in front of
it covers all heads together with an eps of 1e-6 whatever the config says, the recurrence starts from Delta_0 = 0 and
its output is multiplied by 1/sqrt(Dk), there are no positions, and blocks name their parameters as ours do.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from sightline._checks import _wrong_type
from sightline._recurrence_checks import _LARGEST_WIDTH
from sightline._size_checks import check_count, check_flag, check_number
from sightline.models.lightnet import LightNetForCausalLM
from sightline.models.lightnet_config import LightNetConfig
from sightline.nn.lightnet import check_widths

_GATE_NORM_EPS = 1e-6
_DEFAULTS: dict[str, Any] = {
    "hidden_size": 2048,
    "num_hidden_layers": 24,
    "num_heads": None,
    "expand_ratio": 128,
    "hidden_ratio": 4,
    "intermediate_size": None,
    "gate_low_rank_dim": 128,
    "elementwise_affine": True,
    "norm_eps": 1e-6,
    "initializer_range": 0.02,
    "vocab_size": 32000,
    "use_cache": True,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
# What the values must be; LightNetConfig checks pad_token_id, which it has under the same name, against the vocabulary.
_CHECKS: dict[Callable[[str, Any], None], tuple[str, ...]] = {
    check_count: (
        "hidden_size",
        "num_hidden_layers",
        "num_heads",
        "expand_ratio",
        "intermediate_size",
        "gate_low_rank_dim",
        "vocab_size",
    ),
    check_number: ("hidden_ratio", "norm_eps", "initializer_range"),
    check_flag: ("elementwise_affine", "use_cache", "tie_word_embeddings"),
}
_MAY_BE_NONE = {"num_heads", "expand_ratio", "hidden_ratio", "intermediate_size", "elementwise_affine"}
# Options that change what is computed, each with the values that we have.
_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "use_short_conv": (False, None),
    "attn": (None,),
    "hidden_act": ("swish", "silu", None),
    "attnres_block_size": (None,),
    "use_l2warp": (False, None),
    "model_type": ("lightnet",),
}
# Options that choose among ways to compute the same, or that nothing reads.
_WITHOUT_EFFECT = {
    "attn_mode",
    "conv_size",
    "max_position_embeddings",
    "fuse_norm",
    "fuse_swiglu",
    "fuse_cross_entropy",
    "fuse_linear_cross_entropy",
    "auto_map",
}
# What PretrainedConfig of transformers 4 (4.30 to 4.57) writes into every config, besides what the installed one does.
_GENERAL = """
    _name_or_path architectures transformers_version torch_dtype torchscript return_dict output_hidden_states
    output_attentions pruned_heads chunk_size_feed_forward is_encoder_decoder is_decoder cross_attention_hidden_size
    add_cross_attention tie_encoder_decoder finetuning_task task_specific_params problem_type tokenizer_class prefix
    id2label label2id sep_token_id decoder_start_token_id tf_legacy_loss use_bfloat16 attn_implementation
    _attn_implementation_autoset
    max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p
    typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids
    num_return_sequences output_scores return_dict_in_generate forced_bos_token_id forced_eos_token_id
    remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens
"""


def convert_fla_lightnet(
    source: str | Path | Mapping[str, Tensor], config: Mapping[str, Any] | PreTrainedConfig | None = None
) -> Any:
    """`LightNetForCausalLM` with the weights, and the logits, of a LightNet checkpoint of flash-linear-attention.

    Args:
        source: the folder of a checkpoint, or its state dict. A folder has config.json and model.safetensors or
            pytorch_model.bin, whole or in the shards that its index (*.index.json) lists; without an index all
            *.safetensors or pytorch_model*.bin count.
        config: the checkpoint's config as a dict or a config of transformers; needed with a state dict.

    Returns:
        the model in the dtype of the embeddings, in evaluation mode; `save_pretrained` keeps it as one of sightline's.

    Raises:
        FileNotFoundError: the folder has no config or no weights, or not all that its index lists.
        TypeError: the source is neither a folder nor a dict of tensors, the config neither a dict nor one of
            transformers', or an option has the wrong type; the message names it as the checkpoint's config does.
        NotImplementedError: the checkpoint uses an option that `LightNetForCausalLM` lacks; the message names it.
        ValueError: an option is unknown or out of range, sizes do not fit, weights are missing, left over, of another
            shape or not floating-point, or the head differs from the embeddings that it is tied to.

    Source of the layout: flash-linear-attention 0.6; of the model: arXiv 2405.21022.

    >>> weights = LightNetForCausalLM(LightNetConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1,
    ...     num_attention_heads=2, norm_per_head=False, intermediate_size=256, gate_rank=3)).state_dict()
    >>> weights["model.embeddings.weight"] = weights.pop("model.embed_tokens.weight")
    >>> options = {"vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1, "expand_ratio": 4, "gate_low_rank_dim": 3}
    >>> convert_fla_lightnet(weights, options).config.gate
    'swish'
    """
    if isinstance(source, (str, Path)):
        folder = Path(source)
        if config is None:
            path = folder / "config.json"
            if not path.is_file():
                raise FileNotFoundError(
                    f"source: expected a folder with config.json, got {folder}; download a checkpoint of the hub first"
                )
            config = json.loads(path.read_text())
        weights = _read_weights(folder)
    elif isinstance(source, Mapping):
        weights = dict(source)
    else:
        raise _wrong_type("source", "a folder or a state dict", source)
    _check_weights(weights)
    if config is None:
        raise ValueError("config: expected the checkpoint's config with a state dict, got None")
    if isinstance(config, PreTrainedConfig):
        config = config.to_dict()
    if not isinstance(config, Mapping):
        raise TypeError(f"config: expected a dict or a config of transformers, got {type(config).__name__}")
    converted = _convert_config(config)
    return _load(converted, weights, affine=bool(config.get("elementwise_affine", True)))


def _check_weights(weights: dict[Any, Any]) -> None:
    for name, tensor in weights.items():
        if not isinstance(name, str):
            raise _wrong_type("source", "names of weights", name)
        if not isinstance(tensor, Tensor):
            raise _wrong_type("source", f"a tensor as {name}", tensor)


def _convert_config(config: Mapping[str, Any]) -> LightNetConfig:
    for name, values in _SUPPORTED.items():
        if name in config and config[name] not in values:
            raise NotImplementedError(
                f"{name}: expected {values[0]!r}, which LightNetForCausalLM has; got {config[name]!r}"
            )
    general = set(PreTrainedConfig().to_dict()) | set(_GENERAL.split())
    unknown = sorted(set(config) - set(_DEFAULTS) - set(_SUPPORTED) - _WITHOUT_EFFECT - general)
    if unknown:
        raise ValueError(f"config: expected options of flash-linear-attention's LightNet, got {', '.join(unknown)}")
    options = {name: config.get(name, default) for name, default in _DEFAULTS.items()}
    _check_options(options)
    hidden = options["hidden_size"]
    heads, key_dim = _heads_and_key_dim(hidden, options["num_heads"], options["expand_ratio"])
    check_widths("hidden_size", hidden, "num_heads", heads, None, None)
    inside = options["intermediate_size"]
    if inside is None:
        ratio = 4 if options["hidden_ratio"] is None else options["hidden_ratio"]
        inside = -(-int(hidden * ratio * 2 / 3) // 256) * 256
        if inside < 1:
            raise ValueError(f"hidden_ratio: expected hidden_size * hidden_ratio * 2 / 3 of at least 1, got {ratio}")
    same = ("hidden_size", "num_hidden_layers", "vocab_size", "initializer_range", "use_cache", "tie_word_embeddings")
    tokens = ("pad_token_id", "bos_token_id", "eos_token_id")
    return LightNetConfig(
        **{name: options[name] for name in same + tokens},
        num_attention_heads=heads,
        key_dim=key_dim,
        intermediate_size=inside,
        gate_rank=options["gate_low_rank_dim"],
        gate="swish",
        norm_per_head=False,
        position_encoding=None,
        recurrence_scale=key_dim**-0.5,
        rms_norm_eps=options["norm_eps"],
        gate_norm_eps=_GATE_NORM_EPS,
    )


def _check_options(options: dict[str, Any]) -> None:
    """Before anything is computed or renamed, so that a refusal names the option of the checkpoint's config."""
    for check, names in _CHECKS.items():
        for name in names:
            if options[name] is not None or name not in _MAY_BE_NONE:
                check(name, options[name])
    for name in ("bos_token_id", "eos_token_id"):
        for token in options[name] if isinstance(options[name], list) else [options[name]]:
            if isinstance(token, bool) or not isinstance(token, (int, type(None))):
                raise _wrong_type(name, "None, a whole number or a list of them", token)


def _heads_and_key_dim(hidden: int, heads: Any, key_dim: Any) -> tuple[int, int]:
    """Either follows from the other; what does not fit is said in the names that the checkpoint's config has."""
    if heads is None and key_dim is None:
        raise ValueError("num_heads: expected num_heads or expand_ratio in the config, got neither")
    if key_dim is not None and key_dim > _LARGEST_WIDTH:
        raise ValueError(f"expand_ratio: expected at most {_LARGEST_WIDTH}, got {key_dim}")
    if heads is not None:
        if hidden % heads != 0:
            raise ValueError(f"num_heads: expected a divisor of hidden_size = {hidden}, got {heads}")
        return heads, hidden // heads if key_dim is None else key_dim
    if key_dim > hidden:
        raise ValueError(f"expand_ratio: expected at most hidden_size = {hidden} without num_heads, got {key_dim}")
    heads = hidden // key_dim
    if hidden % heads != 0:
        raise ValueError(
            f"expand_ratio: expected hidden_size // expand_ratio heads to divide hidden_size = {hidden}, "
            f"got {key_dim} ({heads} heads)"
        )
    return heads, key_dim


def _load(config: LightNetConfig, weights: dict[str, Tensor], affine: bool) -> Any:
    if {"model.embeddings.weight", "model.embed_tokens.weight"} <= weights.keys():
        raise ValueError("source: expected model.embeddings.weight, got model.embed_tokens.weight besides")
    weights = {name.replace("model.embeddings.", "model.embed_tokens."): tensor for name, tensor in weights.items()}
    if config.tie_word_embeddings and "model.embed_tokens.weight" in weights:
        weights.setdefault("lm_head.weight", weights["model.embed_tokens.weight"])
    model: Any = LightNetForCausalLM(config)
    expected = model.state_dict()
    # Such a norm multiplies by nothing, as ours does with ones; one that comes with the weights is left over.
    plain = [] if affine else [name for name in expected if name.endswith(".attn.g_norm.weight")]
    ones = {name: torch.ones_like(expected.pop(name)) for name in plain}
    missing, extra = sorted(set(expected) - set(weights)), sorted(set(weights) - set(expected))
    if missing or extra:
        raise ValueError(
            f"source: expected the weights of the config's model, got {missing} missing and {extra} besides"
        )
    for name, tensor in expected.items():
        if weights[name].shape != tensor.shape:
            raise ValueError(f"{name}: expected shape {tuple(tensor.shape)}, got {tuple(weights[name].shape)}")
        if not weights[name].is_floating_point():
            raise ValueError(
                f"{name}: expected floating-point weights, got {weights[name].dtype}; convert before quantising"
            )
    embeddings = weights["model.embed_tokens.weight"]
    if config.tie_word_embeddings:
        head = weights["lm_head.weight"]
        # In the wider of the two dtypes, so that rounding hides no difference.
        wider = torch.promote_types(head.dtype, embeddings.dtype)
        if not torch.equal(head.to(embeddings.device, wider), embeddings.to(wider)):
            raise ValueError(
                "lm_head.weight: expected the embeddings, to which tie_word_embeddings ties the head, got other "
                "weights; set tie_word_embeddings to false in the config to keep both"
            )
    model = model.to(embeddings.dtype)
    model.load_state_dict({**weights, **ones})
    return model.eval()


def _read_weights(folder: Path) -> dict[str, Tensor]:
    for kind, pattern in (("model.safetensors", "*.safetensors"), ("pytorch_model.bin", "pytorch_model*.bin")):
        if paths := _weight_files(folder, kind, pattern):
            weights: dict[str, Tensor] = {}
            for path in paths:
                weights.update(_read_file(path))
            return weights
    raise FileNotFoundError(f"source: expected a folder with *.safetensors or pytorch_model*.bin, got {folder}")


def _weight_files(folder: Path, whole: str, pattern: str) -> list[Path]:
    """One file, or the shards of an index; what else lies in the folder may be the same weights once more."""
    index = folder / f"{whole}.index.json"
    if (folder / whole).is_file():
        return [folder / whole]
    if not index.is_file():
        return sorted(folder.glob(pattern))
    shards = sorted({folder / name for name in json.loads(index.read_text())["weight_map"].values()})
    missing = [path.name for path in shards if not path.is_file()]
    if missing:
        raise FileNotFoundError(f"source: expected the shards that {index.name} lists, {', '.join(missing)} missing")
    return shards


def _read_file(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)
