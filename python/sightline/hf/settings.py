"""`config.sightline`: the weighting of a model as JSON, kept in transformers' config.

`{"version": 1, "weighting": {...}, "layers": {"3": {...}}}`: the weighting of every layer, and of single layers by
their `layer_idx`, each as `to_dict` of a weighting writes it. "layers" may be missing. Where nothing stands, softmax
runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sightline.weighting import Softmax, Weighting, weighting_from_dict

NAME = "sightline"
VERSION = 1

_SOFTMAX = Softmax()


def write_settings(weighting: Weighting, layers: Mapping[int, Weighting] | None = None) -> dict[str, Any]:
    """The value of `config.sightline` for this weighting, with single layers of their own where `layers` is given.

    >>> from sightline import LSSA
    >>> write_settings(LSSA())["weighting"]["kind"]
    'softplus'
    """
    settings: dict[str, Any] = {"version": VERSION, "weighting": weighting.to_dict()}
    if layers is not None:
        settings["layers"] = {str(index): layers[index].to_dict() for index in sorted(layers)}
    return settings


def read_settings(settings: Any, layer: int | None = None) -> Weighting:
    """The weighting that `config.sightline` gives the layer of this index.

    Raises TypeError or ValueError, naming config.sightline, where it is not what `write_settings` writes.

    >>> read_settings(None)
    Softmax(length_scale=False, normalize_qk=False, softcap=None, reweight=None)
    """
    if settings is None:
        return _SOFTMAX
    if not isinstance(settings, Mapping):
        raise TypeError(f"config.sightline: expected a mapping with version and weighting, got {settings!r}")
    version = settings.get("version")
    if isinstance(version, int) and version > VERSION:
        raise ValueError(
            f"config.sightline: expected version {VERSION}, got {version}, of a newer sightline; upgrade sightline"
        )
    if version != VERSION or isinstance(version, bool):
        raise ValueError(f"config.sightline: expected version {VERSION}, got {version!r}")
    unknown = [name for name in settings if name not in ("version", "weighting", "layers")]
    if unknown:
        raise ValueError(f"config.sightline: expected version, weighting and layers, got {unknown[0]!r}")
    layers = settings.get("layers")
    if layers is not None and not isinstance(layers, Mapping):
        raise TypeError(f"config.sightline: expected layers to be a mapping from layer to weighting, got {layers!r}")
    chosen: Any = settings.get("weighting")
    if layers is not None and layer is not None:
        chosen = layers.get(str(layer), chosen)
    try:
        return weighting_from_dict(chosen)
    except (TypeError, ValueError) as error:
        raise type(error)(f"config.sightline: {error}") from None
