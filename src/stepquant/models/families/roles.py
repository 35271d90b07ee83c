"""Parts: the role of every convolution and linear inside diffusers' building blocks, declared once.

Keyed by class object: diffusers uses some class names twice.
"""

from __future__ import annotations

from diffusers.models import attention, attention_processor, downsampling, normalization, resnet, upsampling
from diffusers.models.transformers import transformer_2d
from torch import nn

LEAVES = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)

ATTENTION = {
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "attn_out",
    "add_q_proj": "q_added",
    "add_k_proj": "k_added",
    "add_v_proj": "v_added",
    "to_add_out": "attn_out_added",
}

PARTS: dict[type[nn.Module], dict[str, str]] = {
    attention_processor.Attention: ATTENTION,
    attention.FeedForward: {"net.0.proj": "ff_in", "net.2": "ff_out"},
    resnet.ResnetBlock2D: {
        "conv1": "conv",
        "conv2": "conv",
        "time_emb_proj": "modulate",
        "conv_shortcut": "shortcut",
    },
    downsampling.Downsample2D: {"conv": "down"},
    upsampling.Upsample2D: {"conv": "up"},
    transformer_2d.Transformer2DModel: {"proj_in": "proj_in", "proj_out": "proj_out"},
    normalization.AdaLayerNormZero: {"linear": "modulate"},
    normalization.AdaLayerNormSingle: {"linear": "modulate"},
}

PRODUCTS = (attention_processor.Attention,)


def part_roles(module: nn.Module) -> dict[str, str]:
    """Child path -> role for the leaves that `module` owns, itself a building block."""
    roles = dict(PARTS.get(type(module), {}))
    if not isinstance(module, attention_processor.Attention):
        return roles
    if module.added_kv_proj_dim is None and module.is_cross_attention:
        roles |= {"to_k": "k_text", "to_v": "v_text"}
    if getattr(module, "add_q_proj", None) is None:  # text keys beside the image's own
        roles |= {"add_k_proj": "k_text", "add_v_proj": "v_text"}
    return roles
