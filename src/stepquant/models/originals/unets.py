"""The way back for U-Nets."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from stepquant.models.originals.renaming import Tensors, replaced


def latent_diffusion(tensors: Tensors, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The U-Net of Stable Diffusion: its blocks in one list, numbered from one end to the other."""
    layers = config["layers_per_block"]
    attends = ["CrossAttn" in kind for kind in config["up_block_types"]]

    def down(found: re.Match[str]) -> str:
        level, place = int(found[1]), int(found[3])
        return f"input_blocks.{1 + level * (layers + 1) + place}.{'01'[found[2] == 'attentions']}"

    def up(found: re.Match[str]) -> str:
        level, place = int(found[1]), int(found[3])
        return f"output_blocks.{level * (layers + 1) + place}.{'01'[found[2] == 'attentions']}"

    def smaller(found: re.Match[str]) -> str:
        return f"input_blocks.{(int(found[1]) + 1) * (layers + 1)}.0.op"

    def larger(found: re.Match[str]) -> str:
        level = int(found[1])
        return f"output_blocks.{level * (layers + 1) + layers}.{1 + attends[level]}.conv"

    ways: list[tuple[str, Callable[[re.Match[str]], str]]] = [
        (r"^down_blocks\.(\d+)\.(resnets|attentions)\.(\d+)", down),
        (r"^up_blocks\.(\d+)\.(resnets|attentions)\.(\d+)", up),
        (r"^down_blocks\.(\d+)\.downsamplers\.0\.conv", smaller),
        (r"^up_blocks\.(\d+)\.upsamplers\.0\.conv", larger),
        (r"^mid_block\.resnets\.(\d)", lambda found: f"middle_block.{2 * int(found[1])}"),
    ]
    made = {}
    for name, value in tensors.items():
        for pattern, by in ways:
            name = re.sub(pattern, by, name)
        made[name] = value
    residual = r"((?:put_blocks\.\d+\.0|middle_block\.[02])\.)"
    return replaced(
        made,
        [
            (r"^conv_in", "input_blocks.0.0"),
            (r"^conv_norm_out", "out.0"),
            (r"^conv_out", "out.2"),
            (r"^time_embedding\.linear_1", "time_embed.0"),
            (r"^time_embedding\.linear_2", "time_embed.2"),
            (r"^add_embedding\.linear_1", "label_emb.0.0"),
            (r"^add_embedding\.linear_2", "label_emb.0.2"),
            (r"^mid_block\.attentions\.0", "middle_block.1"),
            (residual + r"norm1", r"\1in_layers.0"),
            (residual + r"conv1", r"\1in_layers.2"),
            (residual + r"norm2", r"\1out_layers.0"),
            (residual + r"conv2", r"\1out_layers.3"),
            (residual + r"time_emb_proj", r"\1emb_layers.1"),
            (residual + r"conv_shortcut", r"\1skip_connection"),
        ],
    )
