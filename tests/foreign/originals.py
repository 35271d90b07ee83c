"""Tiny networks in the names of their original repositories: the way back from what diffusers calls their tensors."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

Names = Mapping[str, Tensor]


def replaced(tensors: Names, rules: Sequence[tuple[str, str]]) -> dict[str, Tensor]:
    """Every name through all rules, in their order."""
    made = {}
    for name, value in tensors.items():
        for pattern, by in rules:
            name = re.sub(pattern, by, name)
        made[name] = value
    return made


def joined(tensors: Names, parts: Sequence[str], into: str) -> dict[str, Tensor]:
    """Rows of several layers below each other, as a fused layer has them."""
    made = dict(tensors)
    for name in tensors:
        if parts[0] in name:
            below = [made.pop(name.replace(parts[0], part)) for part in parts]
            made[name.replace(parts[0], into)] = torch.cat(below)
    return made


def ltx(tensors: Names) -> dict[str, Tensor]:
    names = {"proj_in.": "patchify_proj.", "time_embed.": "adaln_single."}
    made = {}
    for name, value in tensors.items():
        for mine, theirs in names.items():
            name = theirs + name.removeprefix(mine) if name.startswith(mine) else name
        made[name.replace("norm_q", "q_norm").replace("norm_k", "k_norm")] = value
    return made


def flux2(tensors: Names) -> dict[str, Tensor]:
    made = dict(tensors) | {"norm_out.linear.weight": swapped(tensors["norm_out.linear.weight"])}
    made = joined(made, [f".attn.to_{part}.weight" for part in "qkv"], ".img_attn.qkv.weight")
    made = joined(made, [f".attn.add_{part}_proj.weight" for part in "qkv"], ".txt_attn.qkv.weight")
    scale = {"q": "query_norm.scale", "k": "key_norm.scale"}
    ways = {
        "time_guidance_embed.timestep_embedder.linear_1": "time_in.in_layer",
        "time_guidance_embed.timestep_embedder.linear_2": "time_in.out_layer",
        "time_guidance_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
        "time_guidance_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
        "context_embedder": "txt_in",
        "x_embedder": "img_in",
        "proj_out": "final_layer.linear",
        "norm_out.linear": "final_layer.adaLN_modulation.1",
        "stream_modulation_img.linear": "stream_modulation_img.lin",
        "stream_modulation_txt.linear": "stream_modulation_txt.lin",
        "stream_modulation.linear": "stream_modulation.lin",
        "single_transformer_blocks": "single_blocks",
        "transformer_blocks": "double_blocks",
        "attn.to_out.0": "img_attn.proj",
        "attn.to_add_out": "txt_attn.proj",
        "ff.linear_in": "img_mlp.0",
        "ff.linear_out": "img_mlp.2",
        "ff_context.linear_in": "txt_mlp.0",
        "ff_context.linear_out": "txt_mlp.2",
        "attn.to_qkv_mlp_proj": "linear1",
        "attn.to_out.": "linear2.",
    }
    for part, word in scale.items():
        ways |= {f"attn.norm_added_{part}.weight": f"txt_attn.norm.{word}"}
    back = {}
    for name, value in made.items():
        for mine, theirs in ways.items():
            name = name.replace(mine, theirs)
        for part, word in scale.items():
            norm = "norm." if name.startswith("single") else "img_attn.norm."
            name = name.replace(f"attn.norm_{part}.weight", norm + word)
        back[name] = value
    return back


def swapped(value: Tensor) -> Tensor:
    return torch.cat(value.chunk(2)[::-1])


def wan(tensors: Names) -> dict[str, Tensor]:
    return replaced(
        tensors,
        [
            (r"^condition_embedder\.time_embedder\.linear_1", "time_embedding.0"),
            (r"^condition_embedder\.time_embedder\.linear_2", "time_embedding.2"),
            (r"^condition_embedder\.text_embedder\.linear_1", "text_embedding.0"),
            (r"^condition_embedder\.text_embedder\.linear_2", "text_embedding.2"),
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


def z_image(tensors: Names) -> dict[str, Tensor]:
    rules = [
        (r"^all_final_layer\.2-1\.", "final_layer."),
        (r"^all_x_embedder\.2-1\.", "x_embedder."),
        (r"\.attention\.to_out\.0\.", ".attention.out."),
        (r"\.attention\.norm_([qk])\.", r".attention.\1_norm."),
    ]
    names = [f"attention.to_{part}.weight" for part in "qkv"]
    return joined(replaced(tensors, rules), names, "attention.qkv.weight")


def sd3(tensors: Names) -> dict[str, Tensor]:
    last = max(int(name.split(".")[1]) for name in tensors if name.startswith("transformer_blocks."))
    swaps = ("norm_out.linear", f"transformer_blocks.{last}.norm1_context.linear")
    made = {n: swapped(v) if n.rpartition(".")[0] in swaps else v for n, v in tensors.items()}
    for parts, into in (
        (("to_q", "to_k", "to_v"), "qkv"),
        (("add_q_proj", "add_k_proj", "add_v_proj"), "context_qkv"),
    ):
        made = joined(made, [f".attn.{part}." for part in parts], f".attn.{into}.")
    block = r"^transformer_blocks\.(\d+)\."
    return replaced(
        made,
        [
            (r"^pos_embed\.pos_embed", "pos_embed"),
            (r"^pos_embed\.proj", "x_embedder.proj"),
            (r"^time_text_embed\.timestep_embedder\.linear_1", "t_embedder.mlp.0"),
            (r"^time_text_embed\.timestep_embedder\.linear_2", "t_embedder.mlp.2"),
            (r"^time_text_embed\.text_embedder\.linear_1", "y_embedder.mlp.0"),
            (r"^time_text_embed\.text_embedder\.linear_2", "y_embedder.mlp.2"),
            (r"^proj_out", "final_layer.linear"),
            (r"^norm_out\.linear", "final_layer.adaLN_modulation.1"),
            (block + r"attn\.context_qkv", r"joint_blocks.\1.context_block.attn.qkv"),
            (block + r"attn\.qkv", r"joint_blocks.\1.x_block.attn.qkv"),
            (block + r"attn\.to_out\.0", r"joint_blocks.\1.x_block.attn.proj"),
            (block + r"attn\.to_add_out", r"joint_blocks.\1.context_block.attn.proj"),
            (block + r"norm1_context\.linear", r"joint_blocks.\1.context_block.adaLN_modulation.1"),
            (block + r"norm1\.linear", r"joint_blocks.\1.x_block.adaLN_modulation.1"),
            (block + r"ff_context\.net\.0\.proj", r"joint_blocks.\1.context_block.mlp.fc1"),
            (block + r"ff_context\.net\.2", r"joint_blocks.\1.context_block.mlp.fc2"),
            (block + r"ff\.net\.0\.proj", r"joint_blocks.\1.x_block.mlp.fc1"),
            (block + r"ff\.net\.2", r"joint_blocks.\1.x_block.mlp.fc2"),
        ],
    )


BLOCKS = [
    (r"(blocks\.\d+\.0|middle_block\.[02])\.norm1", r"\1.in_layers.0"),
    (r"(blocks\.\d+\.0|middle_block\.[02])\.conv1", r"\1.in_layers.2"),
    (r"(blocks\.\d+\.0|middle_block\.[02])\.norm2", r"\1.out_layers.0"),
    (r"(blocks\.\d+\.0|middle_block\.[02])\.conv2", r"\1.out_layers.3"),
    (r"time_emb_proj", "emb_layers.1"),
    (r"conv_shortcut", "skip_connection"),
]


def size_conditioned(tensors: Names) -> dict[str, Tensor]:
    """The U-Net of SDXL, whose first resolution has no attention and which is told sizes and a pooled text."""
    return replaced(
        tensors,
        [
            (r"^conv_in", "input_blocks.0.0"),
            (r"^conv_norm_out", "out.0"),
            (r"^conv_out", "out.2"),
            (r"^time_embedding\.linear_1", "time_embed.0"),
            (r"^time_embedding\.linear_2", "time_embed.2"),
            (r"^add_embedding\.linear_1", "label_emb.0.0"),
            (r"^add_embedding\.linear_2", "label_emb.0.2"),
            (r"^mid_block\.resnets\.0", "middle_block.0"),
            (r"^mid_block\.attentions\.0", "middle_block.1"),
            (r"^mid_block\.resnets\.1", "middle_block.2"),
            (r"^down_blocks\.0\.resnets\.0", "input_blocks.1.0"),
            (r"^down_blocks\.0\.downsamplers\.0\.conv", "input_blocks.2.0.op"),
            (r"^down_blocks\.1\.resnets\.0", "input_blocks.3.0"),
            (r"^down_blocks\.1\.attentions\.0", "input_blocks.3.1"),
            (r"^up_blocks\.0\.resnets\.(\d)", r"output_blocks.\1.0"),
            (r"^up_blocks\.0\.attentions\.(\d)", r"output_blocks.\1.1"),
            (r"^up_blocks\.0\.upsamplers\.0\.conv", "output_blocks.1.2.conv"),
            (r"^up_blocks\.1\.resnets\.0", "output_blocks.2.0"),
            (r"^up_blocks\.1\.resnets\.1", "output_blocks.3.0"),
            *BLOCKS,
        ],
    )


def text_to_image(tensors: Names) -> dict[str, Tensor]:
    """The U-Net of Stable Diffusion, two resolutions of one layer each."""
    return replaced(
        tensors,
        [
            (r"^conv_in", "input_blocks.0.0"),
            (r"^conv_norm_out", "out.0"),
            (r"^conv_out", "out.2"),
            (r"^time_embedding\.linear_1", "time_embed.0"),
            (r"^time_embedding\.linear_2", "time_embed.2"),
            (r"^mid_block\.resnets\.0", "middle_block.0"),
            (r"^mid_block\.attentions\.0", "middle_block.1"),
            (r"^mid_block\.resnets\.1", "middle_block.2"),
            (r"^down_blocks\.0\.resnets\.0", "input_blocks.1.0"),
            (r"^down_blocks\.0\.attentions\.0", "input_blocks.1.1"),
            (r"^down_blocks\.0\.downsamplers\.0\.conv", "input_blocks.2.0.op"),
            (r"^down_blocks\.1\.resnets\.0", "input_blocks.3.0"),
            (r"^up_blocks\.0\.upsamplers\.0\.conv", "output_blocks.1.1.conv"),
            (r"^up_blocks\.0\.resnets\.(\d)", r"output_blocks.\1.0"),
            (r"^up_blocks\.1\.resnets\.0", "output_blocks.2.0"),
            (r"^up_blocks\.1\.attentions\.0", "output_blocks.2.1"),
            (r"^up_blocks\.1\.resnets\.1", "output_blocks.3.0"),
            (r"^up_blocks\.1\.attentions\.1", "output_blocks.3.1"),
            *BLOCKS,
        ],
    )


ORIGINALS: dict[str, Callable[[Names], dict[str, Tensor]]] = {
    one.__name__: one for one in (wan, z_image, sd3, text_to_image, size_conditioned, flux2, ltx)
}
