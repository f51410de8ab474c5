"""Model types of sightline on transformers' Auto classes, for models trained with other weightings than softmax.

Importing this package registers them: AutoConfig, AutoModel and their kin then load what was saved.
"""

from __future__ import annotations

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
)

from sightline.models.lightnet import LightNetForCausalLM, LightNetModel
from sightline.models.lightnet_cache import RecurrenceCache
from sightline.models.lightnet_config import LightNetConfig, LightNetImageConfig
from sightline.models.lightnet_convert import convert_fla_lightnet
from sightline.models.lightnet_image import LightNetForImageClassification, LightNetImageModel
from sightline.models.llama import (
    SightlineLlamaConfig,
    SightlineLlamaForCausalLM,
    SightlineLlamaForSequenceClassification,
    SightlineLlamaModel,
)

AutoConfig.register(SightlineLlamaConfig.model_type, SightlineLlamaConfig)
AutoModel.register(SightlineLlamaConfig, SightlineLlamaModel)
AutoModelForCausalLM.register(SightlineLlamaConfig, SightlineLlamaForCausalLM)
AutoModelForSequenceClassification.register(SightlineLlamaConfig, SightlineLlamaForSequenceClassification)

AutoConfig.register(LightNetConfig.model_type, LightNetConfig)
AutoModel.register(LightNetConfig, LightNetModel)
AutoModelForCausalLM.register(LightNetConfig, LightNetForCausalLM)
AutoConfig.register(LightNetImageConfig.model_type, LightNetImageConfig)
AutoModel.register(LightNetImageConfig, LightNetImageModel)
AutoModelForImageClassification.register(LightNetImageConfig, LightNetForImageClassification)

__all__ = [
    "LightNetConfig",
    "LightNetForCausalLM",
    "LightNetForImageClassification",
    "LightNetImageConfig",
    "LightNetImageModel",
    "LightNetModel",
    "RecurrenceCache",
    "SightlineLlamaConfig",
    "SightlineLlamaForCausalLM",
    "SightlineLlamaForSequenceClassification",
    "SightlineLlamaModel",
    "convert_fla_lightnet",
]
