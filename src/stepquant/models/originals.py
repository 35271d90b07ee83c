"""Networks in the names of their original repositories, which diffusers renames, cuts and reorders when it loads them.

The way back, tensor by tensor. Programs that came before diffusers know no other names. What is written here is not
trusted: `in_original_names` sends what it made through the converter of diffusers, and has to get back what it was given.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers.loaders import single_file_model
from torch import Tensor

from stepquant.errors import ModelError

Tensors = Mapping[str, Tensor]
Rule = tuple[str, str]
QKV = ("to_q", "to_k", "to_v")
ADDED = ("add_q_proj", "add_k_proj", "add_v_proj")
BLOCK = r"^transformer_blocks\.(\d+)\."
SINGLE = r"^single_transformer_blocks\.(\d+)\."


def replaced(tensors: Tensors, rules: Sequence[Rule]) -> dict[str, Tensor]:
    """Every name through all rules, in their order."""
    made = {}
    for name, value in tensors.items():
        for pattern, by in rules:
            name = re.sub(pattern, by, name)
        made[name] = value
    return made


def joined(tensors: Tensors, where: str, parts: Sequence[str], into: str) -> dict[str, Tensor]:
    """Rows of several layers of a block below each other, as a fused layer has them."""
    made = dict(tensors)
    for name in tensors:
        found = re.fullmatch(f"({where}){re.escape(parts[0])}\\.(weight|bias)", name)
        if found:
            block, leaf = found.group(1), found.group(found.lastindex or 0)
            made[f"{block}{into}.{leaf}"] = torch.cat([made.pop(f"{block}{part}.{leaf}") for part in parts])
    return made


def swapped(tensors: Tensors, paths: Sequence[str]) -> dict[str, Tensor]:
    """The halves of what these layers return in the other order: shift and scale are scale and shift elsewhere."""
    return {
        name: torch.cat(value.chunk(2)[::-1]) if name.rpartition(".")[0] in paths else value
        for name, value in tensors.items()
    }


def flux(tensors: Tensors, _: Mapping[str, Any]) -> dict[str, Tensor]:
    made = swapped(tensors, ["norm_out.linear"])
    made = joined(made, BLOCK[1:] + r"attn\.", QKV, "qkv")
    made = joined(made, BLOCK[1:] + r"attn\.", ADDED, "added")
    made = joined(made, SINGLE[1:], [*(f"attn.{part}" for part in QKV), "proj_mlp"], "linear1")
    rules = [(rf"^time_text_embed\.{mine}_embedder\.", f"{theirs}_in.") for mine, theirs in EMBEDDERS.items()]
    return replaced(
        made,
        [
            *rules,
            (r"^(\w+_in)\.linear_1", r"\1.in_layer"),
            (r"^(\w+_in)\.linear_2", r"\1.out_layer"),
            (r"^context_embedder", "txt_in"),
            (r"^x_embedder", "img_in"),
            (r"^proj_out", "final_layer.linear"),
            (r"^norm_out\.linear", "final_layer.adaLN_modulation.1"),
            (r"norm_added_([qk])\.weight", r"txt_attn.norm.\1.scale"),
            (BLOCK + r"attn\.norm_([qk])\.weight", r"double_blocks.\1.img_attn.norm.\2.scale"),
            (SINGLE + r"attn\.norm_([qk])\.weight", r"single_blocks.\1.norm.\2.scale"),
            (r"norm\.q\.scale", "norm.query_norm.scale"),
            (r"norm\.k\.scale", "norm.key_norm.scale"),
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


EMBEDDERS = {"timestep": "time", "text": "vector", "guidance": "guidance"}


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


WAYS: Mapping[str, Callable[[Tensors, Mapping[str, Any]], dict[str, Tensor]]] = {
    "FluxTransformer2DModel": flux,
    "SD3Transformer2DModel": sd3,
    "UNet2DConditionModel": latent_diffusion,
    "WanTransformer3DModel": wan,
    "ZImageTransformer2DModel": z_image,
    "QwenImageTransformer2DModel": lambda tensors, _: dict(tensors),  # whose repository has diffusers' names
}


ARCHITECTURES = {
    "FluxTransformer2DModel": "flux",
    "SD3Transformer2DModel": "sd3",
    "WanTransformer3DModel": "wan",
    "ZImageTransformer2DModel": "lumina2",
    "QwenImageTransformer2DModel": "qwen_image",
}


def architecture_of(kind: str, config: Mapping[str, Any]) -> str | None:
    """What files for ggml call a network, or None where they do not know it."""
    if kind == "UNet2DConditionModel":
        return "sdxl" if config.get("addition_embed_type") == "text_time" else "sd1"
    return ARCHITECTURES.get(kind)


def in_original_names(kind: str, tensors: Tensors, config: Mapping[str, Any]) -> dict[str, Tensor] | None:
    """What a network's tensors are in the original repository, or None where it is not known here."""
    if kind not in WAYS:
        return None
    made = WAYS[kind](tensors, config)
    known: Any = single_file_model.SINGLE_FILE_LOADABLE_CLASSES
    convert = known[kind]["checkpoint_mapping_fn"]
    reasons = []
    for prefix in ("model.diffusion_model.", ""):  # which some converters look for, and few know nothing of
        try:
            back = convert(checkpoint={prefix + n: v for n, v in made.items()}, config=dict(config))
        except (KeyError, IndexError, ValueError, RuntimeError, TypeError) as error:
            reasons.append(f"{type(error).__name__} {str(error).splitlines()[0][:120]}")
            continue
        odd = sorted(
            name
            for name in {*tensors, *back}
            if name not in back or name not in tensors or not torch.equal(back[name], tensors[name])
        )
        if not odd:
            return made
        reasons.append(f"another '{odd[0]}' than it was given")
    raise ModelError(
        f"this {kind} has no original names that diffusers' own converter reads back",
        got="; ".join(reasons),
        expected="a network as its repository published it",
        fix="export it in the names of diffusers: --names diffusers",
    )
