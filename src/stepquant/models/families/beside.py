"""What stands beside a denoiser and knows no time: text encoders, autoencoders and whatever else a pipeline calls."""

from __future__ import annotations

import inspect
from collections.abc import Mapping

from torch import nn

from stepquant.models.families.family import Family

# What touches pixels, and what lies between latents and the network: path pattern -> role.
CODER = {
    "encoder.conv_in": "stem",
    "encoder.conv_out": "head",
    "decoder.conv_in": "stem",
    "decoder.conv_out": "head",
    "quant_conv": "latent",
    "post_quant_conv": "latent",
}
TOP: Mapping[str, Mapping[str, str]] = {
    "AutoencoderKL": CODER,
    "AutoencoderKLTemporalDecoder": CODER | {"decoder.time_conv_out": "latent"},
}


def beside(model: nn.Module, component: str = "") -> Family:
    """A family without a time; the roles that are not declared here follow from building blocks, else from the kind of layer."""
    name = type(model).__name__
    arguments = [one for one in inspect.signature(type(model).forward).parameters if one != "self"]
    return Family(
        models=(name,),
        x=arguments[0] if arguments else "",
        t="",
        top=TOP.get(name, {}),
        blocks=lambda _: (),
        component=component,
        guidance="none",
        generic=True,
    )
