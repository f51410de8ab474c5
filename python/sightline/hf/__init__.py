"""sightline inside transformers models. Importing this package registers the attention implementation "sightline".

>>> import sightline.hf
>>> from transformers import AttentionInterface
>>> "sightline" in AttentionInterface()
True
"""

from __future__ import annotations

from sightline.hf import _transformers  # noqa: F401  (first: it names the remedy where transformers is missing or old)

# isort: split
from transformers import AttentionInterface, AttentionMaskInterface

from sightline.hf.attention import attention_forward
from sightline.hf.masks import sightline_mask
from sightline.hf.settings import NAME, read_settings, write_settings
from sightline.hf.swap import restore_attention, swap_attention
from sightline.hf.visibility import Visibility

AttentionInterface.register(NAME, attention_forward)
# Without this transformers hands the attention function no mask at all.
AttentionMaskInterface.register(NAME, sightline_mask)

__all__ = [
    "Visibility",
    "attention_forward",
    "read_settings",
    "restore_attention",
    "sightline_mask",
    "swap_attention",
    "write_settings",
]
