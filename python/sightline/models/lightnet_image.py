"""LightNet for images: the patches of a 2-D grid in one scan that reads the whole grid at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput

from sightline._checks import _wrong_type
from sightline.models.lightnet import LightNetLayer, LightNetPreTrainedModel, _as_dict
from sightline.models.lightnet_config import LightNetImageConfig
from sightline.nn import ToeplitzPositions
from sightline.position import grid_positions


class LightNetImagePreTrainedModel(LightNetPreTrainedModel):
    """What LightNet's image models share."""

    config_class = LightNetImageConfig
    main_input_name = "pixel_values"
    _input_embed_layer = "patch_embed"
    _is_stateful = False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, LightNetImageModel) and module.class_token is not None:
            init.normal_(module.class_token, std=self.config.initializer_range)
        elif isinstance(module, ToeplitzPositions):
            std = module.query.shape[1] ** -0.25
            init.normal_(module.query, std=std)
            init.normal_(module.key, std=std)
            init.copy_(module.decay_logits, torch.linspace(0.0, 4.0, module.decay_logits.shape[0]))


class LightNetImageModel(LightNetImagePreTrainedModel):
    """LightNet over the patches of an image, without a head.

    >>> sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    >>> model = LightNetImageModel(LightNetImageConfig(image_size=8, patch_size=2, num_channels=1, **sizes))
    >>> model(torch.randn(3, 1, 8, 8)).last_hidden_state.shape
    torch.Size([3, 16, 32])
    """

    def __init__(self, config: LightNetImageConfig) -> None:
        super().__init__(config)
        width, patch = config.hidden_size, config.patch_shape
        self.patch_embed = nn.Conv2d(config.num_channels, width, kernel_size=patch, stride=patch)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width)) if config.pooling == "class" else None
        tpe = config.position_encoding == "tpe"
        self.positions = ToeplitzPositions(width, config.num_attention_heads) if tpe else None
        axes = 2 if config.position_encoding == "lrpe" else None
        self.layers = nn.ModuleList(
            LightNetLayer(config, index, causal=False, position_axes=axes) for index in range(config.num_hidden_layers)
        )
        self.norm = nn.RMSNorm(width, eps=config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Hidden states (B, N, hidden_size) of the patches in row-major order, and their pooled state (B, hidden_size).

        `pixel_values` (B, num_channels, height, width): of any size that the patches divide, the config's or another.
        With pooling "class" the class token comes first.

        Raises TypeError or ValueError for what is no tensor, another number of axes or channels, a size that the
        patches do not divide, or `output_attentions`, which a recurrence does not have.
        """
        config = self.config
        if output_attentions:
            raise ValueError("output_attentions: expected False, for a recurrence has no attention weights; got True")
        if not isinstance(pixel_values, Tensor):
            raise _wrong_type("pixel_values", "a tensor", pixel_values)
        expected, patch = ("B", config.num_channels, "height", "width"), config.patch_shape
        if pixel_values.dim() != 4 or pixel_values.shape[1] != config.num_channels:
            raise ValueError(
                f"pixel_values: expected shape ({', '.join(map(str, expected))}), got {tuple(pixel_values.shape)}"
            )
        height, width = pixel_values.shape[2:]
        if height < 1 or width < 1 or height % patch[0] != 0 or width % patch[1] != 0:
            raise ValueError(
                f"pixel_values: expected height and width to be multiples of the patch size {patch}, "
                f"got {tuple(pixel_values.shape[2:])}"
            )
        grid = self.patch_embed(pixel_values.to(self.patch_embed.weight.dtype)).movedim(1, -1)
        rows, columns = grid.shape[1:3]
        if self.positions is not None:
            grid = grid + self.positions(grid)
        hidden, leading = grid.flatten(1, 2), 0
        if self.class_token is not None:
            hidden, leading = torch.cat([self.class_token.expand(len(hidden), -1, -1), hidden], dim=1), 1
        arguments = {}
        if config.position_encoding == "lrpe":
            arguments["positions"] = grid_positions(rows, columns, leading=leading, device=hidden.device)
        if output_hidden_states is None:
            output_hidden_states = bool(config.output_hidden_states)
        states = []
        for layer in self.layers:
            if output_hidden_states:
                states.append(hidden)
            hidden = layer(hidden, **arguments)
        hidden = self.norm(hidden)
        output = BaseModelOutputWithPooling(
            last_hidden_state=hidden,
            pooler_output=hidden[:, 0] if self.class_token is not None else hidden.mean(1),
            hidden_states=(*states, hidden) if output_hidden_states else None,
        )
        return output if _as_dict(self, return_dict) else output.to_tuple()


class LightNetForImageClassification(LightNetImagePreTrainedModel):
    """LightNet with a linear classifier on the pooled patches: one scan over the grid, linear in the number of patches.

    Source: arXiv 2405.21022.

    >>> sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_labels": 10}
    >>> config = LightNetImageConfig(image_size=8, patch_size=1, num_channels=1, **sizes)
    >>> LightNetForImageClassification(config)(torch.randn(3, 1, 8, 8)).logits.shape
    torch.Size([3, 10])
    """

    def __init__(self, config: LightNetImageConfig) -> None:
        super().__init__(config)
        labels: Any = config.num_labels
        self.num_labels = labels
        self.model = LightNetImageModel(config)
        self.classifier = nn.Linear(config.hidden_size, labels)
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Logits (B, num_labels), and the loss where `labels` (B,) are given; arguments of `LightNetImageModel`."""
        output = self.model(
            pixel_values,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            return_dict=True,
        )
        logits = self.classifier(output.pooler_output)
        loss = None if labels is None else self.loss_function(labels, logits, self.config, **kwargs)
        result = ImageClassifierOutput(loss=loss, logits=logits, hidden_states=output.hidden_states)
        return result if _as_dict(self, return_dict) else result.to_tuple()
