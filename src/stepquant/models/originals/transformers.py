"""The way back for transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from stepquant.models.originals.renaming import Tensors, joined, replaced, swapped

QKV = ("to_q", "to_k", "to_v")
ADDED = ("add_q_proj", "add_k_proj", "add_v_proj")
BLOCK = r"^transformer_blocks\.(\d+)\."
SINGLE = r"^single_transformer_blocks\.(\d+)\."
EMBEDDERS = {"timestep": "time", "text": "vector", "guidance": "guidance"}

FLUX_ENDS = [
    (r"^(\w+_in)\.linear_1", r"\1.in_layer"),
    (r"^(\w+_in)\.linear_2", r"\1.out_layer"),
    (r"^context_embedder", "txt_in"),
    (r"^x_embedder", "img_in"),
    (r"^proj_out", "final_layer.linear"),
    (r"^norm_out\.linear", "final_layer.adaLN_modulation.1"),
]
FLUX_NORMS = [
    (BLOCK + r"attn\.norm_([qk])\.weight", r"double_blocks.\1.img_attn.norm.\2.scale"),
    (SINGLE + r"attn\.norm_([qk])\.weight", r"single_blocks.\1.norm.\2.scale"),
    (r"norm\.q\.scale", "norm.query_norm.scale"),
    (r"norm\.k\.scale", "norm.key_norm.scale"),
]


def joined_streams(tensors: Tensors) -> dict[str, Tensor]:
    """What FLUX and FLUX.2 hold in one piece of each stream's attention."""
    made = swapped(tensors, ["norm_out.linear"])
    made = joined(made, BLOCK[1:] + r"attn\.", QKV, "qkv")
    return joined(made, BLOCK[1:] + r"attn\.", ADDED, "added")


def flux(tensors: Tensors, _: Mapping[str, Any]) -> dict[str, Tensor]:
    made = joined_streams(tensors)
    made = joined(made, SINGLE[1:], [*(f"attn.{part}" for part in QKV), "proj_mlp"], "linear1")
    rules = [(rf"^time_text_embed\.{mine}_embedder\.", f"{theirs}_in.") for mine, theirs in EMBEDDERS.items()]
    return replaced(
        made,
        [
            *rules,
            *FLUX_ENDS,
            (r"norm_added_([qk])\.weight", r"txt_attn.norm.\1.scale"),
            *FLUX_NORMS,
            (BLOCK + r"attn\.txt_attn", r"double_blocks.\1.txt_attn"),
            (BLOCK + r"attn\.qkv", r"double_blocks.\1.img_attn.qkv"),
            (BLOCK + r"attn\.added", r"double_blocks.\1.txt_attn.qkv"),
            (BLOCK + r"attn\.to_out\.0", r"double_blocks.\1.img_attn.proj"),
            (BLOCK + r"attn\.to_add_out", r"double_blocks.\1.txt_attn.proj"),
            (BLOCK + r"norm1\.linear", r"double_blocks.\1.img_mod.lin"),
            (BLOCK + r"norm1_context\.linear", r"double_blocks.\1.txt_mod.lin"),
            (BLOCK + r"ff\.net\.0\.proj", r"double_blocks.\1.img_mlp.0"),
            (BLOCK + r"ff\.net\.2", r"double_blocks.\1.img_mlp.2"),
            (BLOCK + r"ff_context\.net\.0\.proj", r"double_blocks.\1.txt_mlp.0"),
            (BLOCK + r"ff_context\.net\.2", r"double_blocks.\1.txt_mlp.2"),
            (SINGLE + r"norm\.linear", r"single_blocks.\1.modulation.lin"),
            (SINGLE + r"proj_out", r"single_blocks.\1.linear2"),
            (SINGLE + r"linear1", r"single_blocks.\1.linear1"),
        ],
    )


def flux2(tensors: Tensors, _: Mapping[str, Any]) -> dict[str, Tensor]:
    """Whose single blocks are fused in diffusers too, and whose modulation is the same in all blocks."""
    made = joined_streams(tensors)
    rules = [
        (rf"^time_guidance_embed\.{mine}_embedder\.", f"{theirs}_in.") for mine, theirs in EMBEDDERS.items()
    ]
    for side, attention, out, feed in (
        ("txt", r"attn\.added", r"attn\.to_add_out", r"ff_context"),
        ("img", r"attn\.qkv", r"attn\.to_out\.0", r"ff"),
    ):
        block = rf"double_blocks.\1.{side}_"
        rules += [
            (BLOCK + attention, f"{block}attn.qkv"),
            (BLOCK + out, f"{block}attn.proj"),
            (BLOCK + feed + r"\.linear_in", f"{block}mlp.0"),
            (BLOCK + feed + r"\.linear_out", f"{block}mlp.2"),
        ]
    return replaced(
        made,
        [
            *rules,
            *FLUX_ENDS,
            (r"^(\w+_stream_modulation\w*)\.linear", r"\1.lin"),
            (BLOCK + r"attn\.norm_added_([qk])\.weight", r"double_blocks.\1.txt_attn.norm.\2.scale"),
            *FLUX_NORMS,
            (SINGLE + r"attn\.to_qkv_mlp_proj", r"single_blocks.\1.linear1"),
            (SINGLE + r"attn\.to_out", r"single_blocks.\1.linear2"),
        ],
    )


def sd3(tensors: Tensors, config: Mapping[str, Any]) -> dict[str, Tensor]:
    last = config["num_layers"] - 1
    made = swapped(tensors, ["norm_out.linear", f"transformer_blocks.{last}.norm1_context.linear"])
    made = joined(made, BLOCK[1:] + r"attn2?\.", QKV, "qkv")
    made = joined(made, BLOCK[1:] + r"attn\.", ADDED, "added")
    rules = []
    for side, norm, attention, out, feed in (
        ("context", r"norm1_context", r"attn\.added", r"attn\.to_add_out", r"ff_context"),
        ("x", r"norm1", r"attn\.qkv", r"attn\.to_out\.0", r"ff"),
    ):
        block = rf"joint_blocks.\1.{side}_block"
        rules += [
            (BLOCK + norm + r"\.linear", f"{block}.adaLN_modulation.1"),
            (BLOCK + attention, f"{block}.attn.qkv"),
            (BLOCK + out, f"{block}.attn.proj"),
            (BLOCK + feed + r"\.net\.0\.proj", f"{block}.mlp.fc1"),
            (BLOCK + feed + r"\.net\.2", f"{block}.mlp.fc2"),
        ]
    block = r"joint_blocks.\1."
    return replaced(
        made,
        [
            *rules,
            (BLOCK + r"attn2\.qkv", block + "x_block.attn2.qkv"),
            (BLOCK + r"attn2\.to_out\.0", block + "x_block.attn2.proj"),
            (BLOCK + r"attn2\.norm_([qk])", block + r"x_block.attn2.ln_\2"),
            (BLOCK + r"attn\.norm_added_([qk])", block + r"context_block.attn.ln_\2"),
            (BLOCK + r"attn\.norm_([qk])", block + r"x_block.attn.ln_\2"),
            (r"^pos_embed\.pos_embed", "pos_embed"),
            (r"^pos_embed\.proj", "x_embedder.proj"),
            (r"^time_text_embed\.timestep_embedder\.", "t_embedder."),
            (r"^time_text_embed\.text_embedder\.", "y_embedder."),
            (r"^([ty]_embedder)\.linear_1", r"\1.mlp.0"),
            (r"^([ty]_embedder)\.linear_2", r"\1.mlp.2"),
            (r"^proj_out", "final_layer.linear"),
            (r"^norm_out\.linear", "final_layer.adaLN_modulation.1"),
        ],
    )


def wan(tensors: Tensors, _: Mapping[str, Any]) -> dict[str, Tensor]:
    embedders = {"time_embedder": "time_embedding", "text_embedder": "text_embedding"}
    rules = [(rf"^condition_embedder\.{mine}", theirs) for mine, theirs in embedders.items()]
    return replaced(
        tensors,
        [
            *rules,
            (r"^(time|text)_embedding\.linear_1", r"\1_embedding.0"),
            (r"^(time|text)_embedding\.linear_2", r"\1_embedding.2"),
            (r"^condition_embedder\.time_proj", "time_projection.1"),
            (r"^scale_shift_table", "head.modulation"),
            (r"^proj_out", "head.head"),
            (r"scale_shift_table", "modulation"),
            (r"attn1", "self_attn"),
            (r"attn2", "cross_attn"),
            (r"\.to_out\.0\.", ".o."),
            (r"\.to_([qkv])\.", r".\1."),
            (r"ffn\.net\.0\.proj", "ffn.0"),
            (r"ffn\.net\.2", "ffn.2"),
            (r"norm2", "norm_between"),
            (r"norm3", "norm2"),
            (r"norm_between", "norm3"),
        ],
    )


def z_image(tensors: Tensors, _: Mapping[str, Any]) -> dict[str, Tensor]:
    made = joined(tensors, r".*\.attention\.", QKV, "qkv")
    return replaced(
        made,
        [
            (r"^all_final_layer\.2-1\.", "final_layer."),
            (r"^all_x_embedder\.2-1\.", "x_embedder."),
            (r"\.attention\.to_out\.0\.", ".attention.out."),
            (r"\.attention\.norm_([qk])\.", r".attention.\1_norm."),
        ],
    )


def ltx(tensors: Tensors, _: Mapping[str, Any]) -> dict[str, Tensor]:
    return replaced(
        tensors,
        [
            (r"^proj_in", "patchify_proj"),
            (r"^time_embed\.", "adaln_single."),
            (r"\.norm_([qk])\.", r".\1_norm."),
        ],
    )
