"""Feed-forwards: a wide layer, an activation, a narrow layer."""

from __future__ import annotations

from dataclasses import dataclass

from diffusers.models import activations, attention
from diffusers.models import transformers as networks
from torch import nn


@dataclass(frozen=True)
class Feed:
    """`widen` are layers of the same input whose outputs lie side by side before the activation."""

    path: str
    widen: tuple[str, ...]
    activation: str
    narrow: str


@dataclass(frozen=True)
class ImageFeed:
    """Over the pixels of an image: a wide layer, SiLU, a convolution of each channel, values times SiLU of gates, a narrow layer."""

    path: str


# Values, then gates.
GATED: dict[type[nn.Module], tuple[tuple[str, str], str]] = {
    attention.LuminaFeedForward: (("linear_3", "linear_1"), "linear_2"),
    networks.transformer_z_image.FeedForward: (("w3", "w1"), "w2"),
    networks.auraflow_transformer_2d.AuraFlowFeedForward: (("linear_2", "linear_1"), "out_projection"),
    networks.transformer_krea2.Krea2SwiGLU: (("up", "gate"), "down"),
}

GATES_FIRST = (networks.transformer_flux2.Flux2FeedForward, networks.transformer_flux3.Flux3FeedForward)


def feed(path: str, module: nn.Module) -> Feed | None:
    """None for what is no feed-forward of this kind."""
    if type(module) in GATED:
        widen, narrow = GATED[type(module)]
        return Feed(path, widen, "swiglu", narrow)
    if type(module) in GATES_FIRST:
        return Feed(path, ("linear_in",), "swiglu_first", "linear_out")
    if type(module) is not attention.FeedForward or not all(
        type(part) is nn.Dropout for part in (module.net[1], *module.net[3:])
    ):
        return None
    activation = activation_of(module.net[0])
    return None if activation is None else Feed(path, ("net.0.proj",), activation, "net.2")


def image_feed(path: str, module: nn.Module) -> ImageFeed | None:
    """None for what is no feed-forward of this kind."""
    plain = type(module) is networks.sana_transformer.GLUMBConv and module.norm is None
    return ImageFeed(path) if plain and not module.residual_connection else None


def activation_of(wide: nn.Module) -> str | None:
    if type(wide) is activations.GELU:
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(wide.approximate)
    if type(wide) is activations.LinearActivation:
        return "silu" if type(wide.activation) is nn.SiLU else None
    return {activations.GEGLU: "geglu", activations.SwiGLU: "swiglu"}.get(type(wide))
