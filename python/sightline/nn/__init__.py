"""Modules: attention layers and position encodings."""

from __future__ import annotations

from sightline.nn.lightnet import GatedLinearUnit, LightNetAttention, LightNetBlock
from sightline.nn.position import ToeplitzPositions

__all__ = ["GatedLinearUnit", "LightNetAttention", "LightNetBlock", "ToeplitzPositions"]
