"""`swap_attention` and `restore_attention`: a model's attention exchanged in place, and put back."""

from __future__ import annotations

import copy
import gc
import operator
import weakref
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from sightline.hf.attention import forget_weightings
from sightline.hf.interface import attention_modules
from sightline.hf.settings import NAME, write_settings
from sightline.weighting import EXPECTED_WEIGHTING, Softmax, Weighting

Model = TypeVar("Model", bound=PreTrainedModel)

_RECORD = "_sightline_restore"
# Who swapped a config, by its id: as long as that model lives, so does the config.
_owners: weakref.WeakValueDictionary[int, PreTrainedModel] = weakref.WeakValueDictionary()


def swap_attention(
    model: Model,
    weighting: Weighting | Mapping[int, Weighting],
    layers: Iterable[int] | None = None,
) -> Model:
    """Let every attention layer of a transformers model, or the layers named, compute with `weighting`, in place.

    With `Softmax()` the model gives the numbers it gave before. The weighting is written to `config.sightline`, so that
    `save_pretrained` keeps it and `from_pretrained(..., attn_implementation="sightline")` brings it back.

    Whatever has the same config object has the same attention: models that were built from one config are swapped
    together, unless each is given a copy of it. An encoder or decoder that shares the config of its whole model gets a
    copy here, so that it is swapped alone; `save_pretrained` of the whole then does not know of it.

    Args:
        model: a transformers model, or a part of one that is a `PreTrainedModel` (a multimodal model's language model).
        weighting: `Softmax(...)`, `Softplus(...)`, `LSSA()` or `LSSAR()`; or a mapping from layer to weighting, for
            layers that differ.
        layers: the layers that `weighting` is for, by their `layer_idx`; in models of several stacks it counts in each.
            None: all. The other layers keep their softmax.

    Returns:
        The model itself.

    Raises:
        TypeError, ValueError: an argument has the wrong type or value, a layer does not exist, the model is swapped.
        NotImplementedError: the model computes attention outside transformers' attention interface, or does not number
            its layers. The model then is as it was.

    >>> import sightline as sl
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = dict(vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    >>> model = sl.swap_attention(LlamaForCausalLM(LlamaConfig(**sizes)), sl.LSSAR(), layers=[1])
    >>> sl.restore_attention(model).config._attn_implementation
    'sdpa'
    """
    _check_model(model)
    name = type(model).__name__
    chosen = _chosen_layers(weighting, layers)
    if _is_swapped(model):
        raise ValueError(
            f"model: expected {name} with its own attention, got one that is swapped, or shares its config with one "
            "that is; restore_attention first"
        )
    through, aside = attention_modules(model)
    if aside or not through:
        place = ", ".join(sorted({type(module).__name__ for module in aside.values()})) or "no module"
        raise NotImplementedError(
            f"model: expected every attention layer of {name} to go through transformers' attention interface, but "
            f"attention is computed in {place}" + ("" if aside else " that uses it")
        )
    if not model._can_set_attn_implementation():
        raise NotImplementedError(f"model: {name} does not let its attention implementation be set")
    if chosen is None:
        settings = write_settings(weighting)  # type: ignore[arg-type]
        weightings = [weighting]
    else:
        _check_layers(name, chosen, through)
        settings = write_settings(Softmax(), chosen)
        weightings = list(chosen.values())
    _check_sinks(name, weightings, through)
    _check_outputs(name, through)

    shared = _take_configs(model) if _is_half(model) else []
    record = [
        (config, config._attn_implementation_internal, "sightline" in vars(config), vars(config).get("sightline"))
        for config in _configs(model)
    ]
    try:
        for config, *_ in record:
            config.sightline = settings
        model.set_attn_implementation(NAME)
        unset = {type(module).__name__ for module in through.values() if _implementation(module) != NAME}
        if unset:
            raise NotImplementedError(f"model: {', '.join(sorted(unset))} of {name} kept its own attention")
    except BaseException:
        _put_back(record)
        for module, config in shared:
            module.__dict__["config"] = config
        raise
    _owners.update((id(config), model) for config, *_ in record)
    model.__dict__[_RECORD] = record
    return model


def restore_attention(model: Model) -> Model:
    """Give a model that `swap_attention` swapped the attention back that it had before, in place; returns it.

    Raises TypeError where it is no transformers model, ValueError where it was not swapped. A model that was loaded
    with `attn_implementation="sightline"` has no attention to go back to: `model.set_attn_implementation("sdpa")`.

    >>> import sightline as sl
    >>> from transformers import BertConfig, BertModel
    >>> model = BertModel(BertConfig(vocab_size=9, hidden_size=8, num_attention_heads=2, num_hidden_layers=1))
    >>> sl.restore_attention(sl.swap_attention(model, sl.Softmax())) is model
    True
    """
    _check_model(model)
    if _RECORD not in model.__dict__:
        raise ValueError(
            f"model: expected a {type(model).__name__} that swap_attention swapped, got one that it did not; "
            "set_attn_implementation chooses another implementation"
        )
    _put_back(model.__dict__.pop(_RECORD))
    forget_weightings(model)
    return model


def _put_back(record: list[tuple[PreTrainedConfig, Any, bool, Any]]) -> None:
    for config, implementation, had_settings, settings in record:
        _owners.pop(id(config), None)
        # The attribute behind the property, which would write to the configs inside this one too.
        config._attn_implementation_internal = implementation
        if had_settings:
            config.sightline = settings
        else:
            vars(config).pop("sightline", None)


def _check_model(model: Any) -> None:
    if isinstance(model, PreTrainedModel):
        return
    inside = ""
    if isinstance(model, nn.Module):
        names = [name for name, module in model.named_modules() if isinstance(module, PreTrainedModel)]
        inside = f"; the one in it is its {names[0]}" if names else ""
    raise TypeError(f"model: expected a transformers PreTrainedModel, got {type(model).__name__}{inside}")


def _is_swapped(model: PreTrainedModel) -> bool:
    """Whether the model is swapped, or a part of it, or another that shares a config with it."""

    def found() -> bool:
        return any(
            _RECORD in module.__dict__ or id(module.__dict__.get("config")) in _owners for module in model.modules()
        )

    if not found():
        return False
    gc.collect()  # a model that nobody can restore any more
    return found()


def _is_half(model: PreTrainedModel) -> bool:
    """Whether this is an encoder or a decoder with the config of both."""
    return getattr(model.config, "is_encoder_decoder", False) and type(model).__name__.endswith(("Encoder", "Decoder"))


def _take_configs(model: PreTrainedModel) -> list[tuple[nn.Module, PreTrainedConfig]]:
    """Give the modules of a model copies of their configs; returns who had which."""
    copies: dict[int, Any] = {}  # of all configs, those in others too, so that what they share they go on sharing
    had = []
    for module in model.modules():
        config = module.__dict__.get("config")
        if isinstance(config, PreTrainedConfig):
            had.append((module, config))
            module.__dict__["config"] = copy.deepcopy(config, copies)
    return had


def _implementation(module: Any) -> str | None:
    return module.config._attn_implementation


def _configs(model: PreTrainedModel) -> list[PreTrainedConfig]:
    """Every config in use in the model, and those inside them, each once."""
    found: dict[int, PreTrainedConfig] = {}

    def add(config: Any) -> None:
        if isinstance(config, PreTrainedConfig) and id(config) not in found:
            found[id(config)] = config
            for name in config.sub_configs:
                add(getattr(config, name, None))

    for module in model.modules():
        add(getattr(module, "config", None))
    return list(found.values())


def _chosen_layers(weighting: Any, layers: Any) -> dict[int, Weighting] | None:
    """The weighting of each layer that is named, None for all layers alike; checks types."""
    if isinstance(weighting, Mapping):
        if layers is not None:
            raise ValueError(f"layers: expected None where weighting maps layers to weightings, got {layers!r}")
        chosen = dict(weighting)
        name = "weighting"
    else:
        if not isinstance(weighting, Weighting):
            raise TypeError(f"weighting: expected {EXPECTED_WEIGHTING}, got {weighting!r}")
        if layers is None:
            return None
        if isinstance(layers, (str, bytes)) or not isinstance(layers, Iterable):
            raise TypeError(f"layers: expected None or indices of layers, got {layers!r}")
        chosen = dict.fromkeys(map(_as_index, layers), weighting)
        name = "layers"
    for index, value in chosen.items():
        if isinstance(index, bool) or not isinstance(index, int):
            raise TypeError(f"{name}: expected indices of layers, got {index!r}")
        if not isinstance(value, Weighting):
            raise TypeError(f"weighting: expected {EXPECTED_WEIGHTING} for layer {index}, got {value!r}")
    if not chosen:
        raise ValueError(f"{name}: expected at least one layer, got none")
    return chosen


def _as_index(index: Any) -> Any:
    """NumPy's integers as Python's; what is none, and True, as they came."""
    return operator.index(index) if hasattr(index, "__index__") and not isinstance(index, bool) else index


def _check_outputs(name: str, modules: dict[str, nn.Module]) -> None:
    if any(getattr(module.config, "output_attentions", False) for module in modules.values()):
        raise ValueError(
            f"model: expected config.output_attentions to be False in {name}, got True, which transformers takes from "
            "eager attention alone; set it to False and pass output_attentions=True in the call"
        )


def _check_layers(name: str, chosen: dict[int, Weighting], modules: dict[str, nn.Module]) -> None:
    indices: set[int] = set()
    for module in modules.values():
        index = getattr(module, "layer_idx", None)
        if index is not None:
            indices.add(int(index))
            continue
        raise NotImplementedError(
            f"layers: expected None for {name}, whose {type(module).__name__} does not know its index (layer_idx), "
            f"got {sorted(chosen)}; swap all layers"
        )
    missing = sorted(set(chosen) - indices)
    if missing:
        raise ValueError(
            f"layers: expected indices of {name}'s attention layers, {min(indices)} to {max(indices)}, got {missing[0]}"
        )


def _check_sinks(name: str, weightings: list[Any], modules: dict[str, nn.Module]) -> None:
    if not any(isinstance(weighting, Softmax) and weighting.reweight is not None for weighting in weightings):
        return
    if any(getattr(module, "sinks", None) is not None for module in modules.values()):
        raise NotImplementedError(
            f"weighting: expected a Softmax without reweight for {name}, whose attention has sinks, got one with it"
        )
