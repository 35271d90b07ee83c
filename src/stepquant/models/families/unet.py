"""U-Nets of diffusers: declarations, the walk in execution order and the skip concatenations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from diffusers.models.unets import unet_1d_blocks
from torch import nn

from stepquant.models.families.family import Family, middle

TOP = {
    "conv_in": "stem",
    "conv_out": "head",
    "time_embedding.linear_*": "time",
    "add_embedding.linear_*": "cond",
    "class_embedding.linear_*": "cond",
}
# The first layer of a residual block, the shortcut that reads the same, and the last layer.
RESIDUAL = (
    ("conv1", "conv_shortcut", "conv2"),
    ("spatial_res_block.conv1", "spatial_res_block.conv_shortcut", "spatial_res_block.conv2"),
    ("conv_1", "conv_skip", "conv_2"),
    ("conv_in.conv1d", "residual_conv", "conv_out.conv1d"),
)


def walk(model: nn.Module) -> Iterator[str]:
    """Residual, attention and resampling blocks in the order in which they run."""
    yield from (name for name in ("image_latents_temporal_encoder", "transformer_in") if hasattr(model, name))
    for level in ("down_blocks", "mid_block", "up_blocks"):
        node = getattr(model, level, None)
        if isinstance(node, nn.ModuleList):
            for index, block in enumerate(node):
                yield from walk_block(f"{level}.{index}", block)
        elif node is not None:
            yield from walk_block(level, node)
    if getattr(model, "out_block", None) is not None:
        yield "out_block"


def walk_block(name: str, block: nn.Module) -> Iterator[str]:
    resnets, attentions = (len(getattr(block, kind, None) or ()) for kind in ("resnets", "attentions"))
    # In the middle, one residual block comes first, then pairs of attention and residual block.
    leading = name == "mid_block" and not isinstance(block, unet_1d_blocks.UNetMidBlock1D)
    per_resnet = attentions // max(resnets - leading, 1)
    present = [a is not None for a in getattr(block, "attentions", None) or ()]
    for index in range(resnets):
        turn = index - 1 if leading else index
        mine = range(turn * per_resnet, (turn + 1) * per_resnet) if turn >= 0 else ()
        paths = [f"{name}.attentions.{a}" for a in mine if present[a]]
        paths += [
            f"{name}.{kind}.{turn}"
            for kind in ("temp_attentions", "motion_modules")
            if has(block, kind, turn)
        ]
        residual = [f"{name}.resnets.{index}"]
        residual += [f"{name}.temp_convs.{index}"] if has(block, "temp_convs", index) else []
        yield from paths + residual if leading else residual + paths
    for kind in ("downsamplers", "upsamplers"):
        yield from (f"{name}.{kind}.{i}" for i in range(len(getattr(block, kind, None) or ())))
    for kind in ("downsample", "upsample"):
        yield from (f"{name}.{kind}" for child in [getattr(block, kind, None)] if child is not None)


def has(block: nn.Module, kind: str, index: int) -> bool:
    return 0 <= index < len(getattr(block, kind, None) or ())


def deepest(blocks: Sequence[str]) -> str:
    """The attention of the middle block, or what stands in its place."""
    inner = [path for path in blocks if path.startswith("mid_block")]
    return next((path for path in inner if ".attentions." in path), inner[0] if inner else middle(blocks))


def concats(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Layer path -> widths of (hidden, skip) where a block is fed a concatenation."""
    found: dict[str, tuple[int, int]] = {}
    layers: dict[str, Any] = dict(model.named_modules())
    hidden = layers["conv_in"].out_channels if "conv_in" in layers else layers[""].config.in_channels
    for path in walk(model):
        for first, shortcut, last in ([f"{path}.{child}" for child in group] for group in RESIDUAL):
            width = getattr(layers.get(first), "in_channels", None)
            if width is None:
                continue
            if width != hidden:
                found |= {name: (hidden, width - hidden) for name in (first, shortcut) if name in layers}
            hidden = layers[last].out_channels
    return found


FAMILIES = (
    Family(
        models=("UNet2DModel",),
        x="sample",
        top=TOP,
        blocks=walk,
        component="unet",
        cond=("class_labels",),
        guidance="none",
        deepest=deepest,
        concats=concats,
    ),
    Family(
        models=("UNet2DConditionModel",),
        x="sample",
        top={
            **TOP,
            "add_embedding.proj": "cond",
            "add_embedding.pool.*_proj": "cond",
            "encoder_hid_proj": "context",
            "time_embedding.cond_proj": "time",
        },
        blocks=walk,
        component="unet",
        text=("encoder_hidden_states", "encoder_attention_mask"),
        cond=("added_cond_kwargs", "class_labels", "timestep_cond"),
        shared=("cross_attention_kwargs",),
        deepest=deepest,
        concats=concats,
    ),
    Family(
        models=("UNet3DConditionModel",),
        x="sample",
        top=TOP,
        blocks=walk,
        component="unet",
        text=("encoder_hidden_states",),
        cond=("class_labels", "timestep_cond"),
        shared=("cross_attention_kwargs",),
        deepest=deepest,
        concats=concats,
    ),
    Family(
        models=("UNetSpatioTemporalConditionModel",),
        channels=2,
        x="sample",
        top={**TOP, "**.time_pos_embed.linear_*": "const"},
        blocks=walk,
        component="unet",
        text=("encoder_hidden_states",),
        cond=("added_time_ids",),
        deepest=deepest,
        concats=concats,
    ),
    Family(
        models=("AudioLDM2UNet2DConditionModel",),
        x="sample",
        top=TOP,
        blocks=walk,
        component="unet",
        text=(
            "encoder_hidden_states",
            "encoder_hidden_states_1",
            "encoder_attention_mask",
            "encoder_attention_mask_1",
        ),
        cond=("class_labels", "timestep_cond"),
        shared=("cross_attention_kwargs",),
        deepest=deepest,
        concats=concats,
    ),
    Family(
        models=("UNet1DModel",),
        x="sample",
        top={
            "time_mlp.linear_*": "time",
            "out_block.final_conv1d_1": "conv",
            "out_block.final_conv1d_2": "head",
        },
        blocks=walk,
        component="unet",
        guidance="none",
        deepest=deepest,
        concats=concats,
    ),
    Family(
        models=("UNetMotionModel",),
        x="sample",
        top={**TOP, "time_embedding.cond_proj": "time"},
        blocks=walk,
        component="unet",
        text=("encoder_hidden_states",),
        cond=("added_cond_kwargs", "timestep_cond"),
        shared=("cross_attention_kwargs",),
        deepest=deepest,
        concats=concats,
    ),
    Family(
        models=("I2VGenXLUNet",),
        x="sample",
        top={
            **TOP,
            "context_embedding.*": "context",
            "fps_embedding.*": "cond",
            "image_latents_context_embedding.*": "context",
            "image_latents_proj_in.*": "context",
        },
        blocks=walk,
        component="unet",
        prompt_blocks=("image_latents_temporal_encoder",),
        text=("encoder_hidden_states", "image_latents", "image_embeddings"),
        cond=("fps",),
        shared=("cross_attention_kwargs",),
        deepest=deepest,
        concats=concats,
    ),
)
