"""U-Nets of diffusers: declarations, the walk in execution order and the skip concatenations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from stepquant.models.families.family import Family, middle

TIME = {"time_embedding.linear_1": "time", "time_embedding.linear_2": "time"}
CLASS = {"class_embedding.linear_1": "cond", "class_embedding.linear_2": "cond"}
TOP = {"conv_in": "stem", "conv_out": "head", **TIME, **CLASS}


def walk(model: nn.Module) -> Iterator[str]:
    """Residual, attention and resampling blocks in the order in which they run."""
    for level in ("down_blocks", "mid_block", "up_blocks"):
        node = getattr(model, level, None)
        if isinstance(node, nn.ModuleList):
            for index, block in enumerate(node):
                yield from walk_block(f"{level}.{index}", block)
        elif node is not None:
            yield from walk_block(level, node)


def walk_block(name: str, block: nn.Module) -> Iterator[str]:
    resnets, attentions = (len(getattr(block, kind, None) or ()) for kind in ("resnets", "attentions"))
    leading = name == "mid_block"  # one resnet first, then pairs of attention and resnet
    per_resnet = attentions // max(resnets - leading, 1)
    present = [a is not None for a in getattr(block, "attentions", None) or ()]
    for index in range(resnets):
        turn = index - 1 if leading else index
        mine = range(turn * per_resnet, (turn + 1) * per_resnet) if turn >= 0 else ()
        paths = [f"{name}.attentions.{a}" for a in mine if present[a]]
        residual = [f"{name}.resnets.{index}"]
        yield from paths + residual if leading else residual + paths
    for kind in ("downsamplers", "upsamplers"):
        yield from (f"{name}.{kind}.{i}" for i in range(len(getattr(block, kind, None) or ())))


def deepest(blocks: Sequence[str]) -> str:
    """The attention of the middle block, or what stands in its place."""
    inner = [path for path in blocks if path.startswith("mid_block")]
    return next((path for path in inner if ".attentions." in path), inner[0] if inner else middle(blocks))


def concats(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Layer path -> widths of (hidden, skip) where an up block feeds it a concatenation."""
    found: dict[str, tuple[int, int]] = {}
    hidden = 0
    for path in walk(model):
        block: Any = model.get_submodule(path)
        first = getattr(block, "conv1", None)
        if first is None:
            continue
        width = first.in_channels
        if path.startswith("up_blocks") and width != hidden:
            for child in ("conv1", "conv_shortcut"):
                if getattr(block, child, None) is not None:
                    found[f"{path}.{child}"] = (hidden, width - hidden)
        hidden = block.conv2.out_channels
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
            "add_embedding.linear_1": "cond",
            "add_embedding.linear_2": "cond",
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
)
