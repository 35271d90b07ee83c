"""Structure: the chains of a model that may run as one, by module path; declared here, never guessed while running."""

from __future__ import annotations

from dataclasses import dataclass

from diffusers.models import activations, attention, attention_processor, downsampling, resnet, upsampling
from diffusers.models.transformers import transformer_2d
from diffusers.models.unets import unet_2d_blocks, unet_2d_condition
from torch import nn

from stepquant.errors import ModelError
from stepquant.models.denoiser import family_of
from stepquant.models.family import matches
from stepquant.models.parts import part_roles


@dataclass(frozen=True)
class ResidualUnit:
    """norm1 -> SiLU -> conv1 (+ time) -> norm2 -> SiLU -> conv2 (+ shortcut or input), divided by `divisor`."""

    path: str
    divisor: float
    timed: bool  # adds SiLU -> time_emb_proj to what conv1 returns
    shortcut: bool  # a convolution reads the raw input; otherwise the input itself is added
    width: int  # channels that the time embedding becomes


@dataclass(frozen=True)
class AttentionUnit:
    """[group norm ->] q, k, v -> product -> out (+ input), divided by `divisor`, over the pixels of an image."""

    path: str
    normed: bool
    heads: int
    residual: bool
    divisor: float


@dataclass(frozen=True)
class TransformerUnit:
    """Group norm -> proj_in -> blocks over the pixels of an image -> proj_out (+ input)."""

    path: str
    linear: bool  # the projections are linears over pixels, otherwise convolutions over the image


@dataclass(frozen=True)
class TextBlock:
    """Layer norm -> self-attention (+ input), layer norm -> attention to a text (+), layer norm -> GEGLU -> out (+)."""

    path: str
    heads: tuple[int, int]  # of the first and of the second attention
    unless: tuple[str, ...] = (
        "_chunk_size",
    )  # attributes that change what the block computes once they are set


@dataclass(frozen=True)
class Resampler:
    """A convolution that reads the raw stream, before which pixels are doubled or a border is added."""

    path: str
    doubles: bool
    border: tuple[int, int, int, int] | None = (
        None  # left, right, top, bottom, where the convolution has none
    )


@dataclass(frozen=True)
class UpBlock:
    """Residual units that each read a concatenation with a skip, an attention unit behind each, then upsamplers."""

    path: str
    residuals: tuple[str, ...]
    attentions: tuple[str | None, ...]
    upsamplers: tuple[str, ...]
    sized: bool  # hands the upsampler a size
    textual: bool  # hands the attention units a text
    unless: tuple[str, ...] = ()  # attributes that change what the block computes once they are set


@dataclass(frozen=True)
class Structure:
    """All chains of one model. `tail` is norm -> SiLU -> head; `time` is projection -> embedding of t alone.

    `text` is the argument that reaches every text block as it is.
    """

    residuals: tuple[ResidualUnit, ...] = ()
    attentions: tuple[AttentionUnit, ...] = ()
    transformers: tuple[TransformerUnit, ...] = ()
    text_blocks: tuple[TextBlock, ...] = ()
    resamplers: tuple[Resampler, ...] = ()
    up_blocks: tuple[UpBlock, ...] = ()
    tail: tuple[str, str, str] | None = None
    time: tuple[str, str] | None = None
    text: str | None = None

    def time_layers(self) -> list[str]:
        """The layers between the time projection and what each residual unit adds."""
        if self.time is None:
            return []
        embedding = [f"{self.time[1]}.linear_1", f"{self.time[1]}.linear_2"]
        return embedding + [f"{unit.path}.time_emb_proj" for unit in self.residuals if unit.timed]


def structure(model: nn.Module) -> Structure:
    """What of `model` fits the chains above; blocks that differ in any way are left out."""
    named = [(path, module) for path, module in model.named_modules() if path]
    return Structure(
        residuals=tuple(residual_unit(p, m) for p, m in named if is_plain_residual(m)),
        attentions=tuple(attention_unit(p, m) for p, m in named if is_plain_attention(m)),
        transformers=tuple(transformer_unit(p, m) for p, m in named if is_plain_transformer(m)),
        text_blocks=tuple(text_block(p, m) for p, m in named if is_plain_text_block(m)),
        resamplers=tuple(resampler(p, m) for p, m in named if is_plain_resampler(m)),
        up_blocks=tuple(up_block(p, m) for p, m in named if is_plain_up_block(m)),
        tail=tail(model),
        time=time_path(model),
        text=text_argument(model),
    )


def roles(model: nn.Module) -> dict[str, str]:
    """Path -> role wherever a declaration names one; unlike `Denoiser.sites` also when layers were replaced."""
    paths = {path for path, _ in model.named_modules()}
    found: dict[str, str] = {}
    for path, module in model.named_modules():
        found |= {f"{path}.{child}" if path else child: role for child, role in part_roles(module).items()}
    try:
        top = family_of(model).top
    except ModelError:
        top = {}
    found |= {path: role for pattern, role in top.items() for path in paths if matches(pattern, path)}
    halves = {f"{path}.{half}": role for path, role in found.items() for half in (0, 1)}
    return {path: role for path, role in (found | halves).items() if path in paths}


def is_plain_residual(module: nn.Module) -> bool:
    return (
        type(module) is resnet.ResnetBlock2D
        and module.upsample is None
        and module.downsample is None
        and isinstance(module.nonlinearity, nn.SiLU)
        and module.time_embedding_norm == "default"
        and not (module.skip_time_act and module.time_emb_proj is not None)
    )


def residual_unit(path: str, module: nn.Module) -> ResidualUnit:
    timed, shortcut = module.time_emb_proj is not None, module.conv_shortcut is not None
    width = int(module.conv1.out_channels)  # type: ignore[union-attr, arg-type]
    return ResidualUnit(path, float(module.output_scale_factor), timed, shortcut, width)  # type: ignore[arg-type]


def is_default_attention(module: nn.Module | None) -> bool:
    """Attention with the default processor and nothing between its projections and its product."""
    return (
        type(module) is attention_processor.Attention
        and (type(module.processor) is attention_processor.AttnProcessor2_0 or hasattr(module, "product"))
        and module.added_kv_proj_dim is None
        and not module.fused_projections
        and all(
            getattr(module, name, None) is None for name in ("spatial_norm", "norm_q", "norm_k", "norm_cross")
        )
    )


def is_plain_attention(module: nn.Module) -> bool:
    """Self-attention over an image."""
    return bool(
        is_default_attention(module)
        and module._from_deprecated_attn_block
        and not module.is_cross_attention
        and (module.group_norm is None or isinstance(module.group_norm, nn.GroupNorm))
    )


def attention_unit(path: str, module: nn.Module) -> AttentionUnit:
    return AttentionUnit(
        path,
        normed=module.group_norm is not None,
        heads=int(module.heads),  # type: ignore[arg-type]
        residual=bool(module.residual_connection),
        divisor=float(module.rescale_output_factor),  # type: ignore[arg-type]
    )


def is_plain_transformer(module: nn.Module) -> bool:
    return (
        type(module) is transformer_2d.Transformer2DModel
        and bool(module.is_input_continuous)
        and type(module.norm) is nn.GroupNorm
    )


def transformer_unit(path: str, module: nn.Module) -> TransformerUnit:
    return TransformerUnit(path, linear=bool(module.use_linear_projection))


def is_plain_text_block(module: nn.Module) -> bool:
    return (
        type(module) is attention.BasicTransformerBlock
        and module.norm_type == "layer_norm"
        and module.pos_embed is None
        and not module.only_cross_attention
        and all(type(norm) is nn.LayerNorm for norm in (module.norm1, module.norm2, module.norm3))
        and is_bare_attention(module.attn1)
        and is_bare_attention(module.attn2)
        and not module.attn1.is_cross_attention
        and bool(module.attn2.is_cross_attention)  # type: ignore[union-attr]
        and type(module.ff) is attention.FeedForward
        and [type(part) for part in module.ff.net][:2] == [activations.GEGLU, nn.Dropout]
        and all(type(part) is nn.Dropout for part in module.ff.net[3:])
    )


def is_bare_attention(module: nn.Module | None) -> bool:
    """Attention over rows of tokens, whose surroundings normalize and add."""
    return bool(
        is_default_attention(module)
        and module.group_norm is None  # type: ignore[union-attr]
        and not module.residual_connection  # type: ignore[union-attr]
        and module.rescale_output_factor == 1.0  # type: ignore[union-attr]
        and module.inner_kv_dim == module.inner_dim  # type: ignore[union-attr]
    )


def text_block(path: str, module: nn.Module) -> TextBlock:
    return TextBlock(path, (int(module.attn1.heads), int(module.attn2.heads)))  # type: ignore[union-attr, arg-type]


def is_plain_resampler(module: nn.Module) -> bool:
    if type(module) is upsampling.Upsample2D:
        return bool(
            module.norm is None
            and module.use_conv
            and module.interpolate
            and not module.use_conv_transpose
            and module.name == "conv"
        )
    return type(module) is downsampling.Downsample2D and module.norm is None and bool(module.use_conv)


def resampler(path: str, module: nn.Module) -> Resampler:
    doubles = type(module) is upsampling.Upsample2D
    return Resampler(path, doubles, (0, 1, 0, 1) if not doubles and module.padding == 0 else None)


FREE_U = ("s1", "s2", "b1", "b2")
UP_BLOCKS: dict[type[nn.Module], tuple[str, ...]] = {
    unet_2d_blocks.UpBlock2D: FREE_U,
    unet_2d_blocks.CrossAttnUpBlock2D: FREE_U,
    unet_2d_blocks.AttnUpBlock2D: (),
}


def is_plain_up_block(module: nn.Module) -> bool:
    if type(module) not in UP_BLOCKS:
        return False
    return all(type(upsampler) is upsampling.Upsample2D for upsampler in module.upsamplers or ())  # type: ignore[union-attr]


def up_block(path: str, module: nn.Module) -> UpBlock:
    residuals, attentions, upsamplers = (
        tuple(f"{path}.{kind}.{i}" for i in range(len(getattr(module, kind, None) or ())))
        for kind in ("resnets", "attentions", "upsamplers")
    )
    kind = type(module)
    return UpBlock(
        path,
        residuals,
        attentions or (None,) * len(residuals),
        upsamplers,
        sized=kind is not unet_2d_blocks.AttnUpBlock2D,
        textual=kind is unet_2d_blocks.CrossAttnUpBlock2D,
        unless=UP_BLOCKS[kind],
    )


def tail(model: nn.Module) -> tuple[str, str, str] | None:
    names = ("conv_norm_out", "conv_act", "conv_out")
    norm, activation, head = (getattr(model, name, None) for name in names)
    return (
        names
        if isinstance(norm, nn.GroupNorm) and isinstance(activation, nn.SiLU) and head is not None
        else None
    )


def time_path(model: nn.Module) -> tuple[str, str] | None:
    names = ("time_proj", "time_embedding")
    return names if all(isinstance(getattr(model, name, None), nn.Module) for name in names) else None


def text_argument(model: nn.Module) -> str | None:
    """The argument that every text block reads unchanged."""
    plain = type(model) is unet_2d_condition.UNet2DConditionModel and model.encoder_hid_proj is None
    return "encoder_hidden_states" if plain else None
