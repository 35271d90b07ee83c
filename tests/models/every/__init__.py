"""One tiny model, with its inputs, of every denoiser class that diffusers exports.

A builder answers a model that is ready to run and the keyword arguments of its forward for a batch of two, of which
the first is what is noisy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from tests.models.every.audio import AUDIO
from tests.models.every.build import Case, seeded
from tests.models.every.film import FILM
from tests.models.every.flow import FLOW
from tests.models.every.image import IMAGE
from tests.models.every.other import OTHER
from tests.models.every.parts import NO_DENOISERS, NOT_TINY
from tests.models.every.unets import UNETS
from tests.models.every.video import VIDEO

__all__ = ["BUILDERS", "BUILT_ELSEWHERE", "NOT_TINY", "NO_DENOISERS"]

BUILDERS: Mapping[str, Callable[[], Case]] = MappingProxyType(
    {
        name: seeded(build)
        for kind in (IMAGE, FLOW, VIDEO, FILM, AUDIO, UNETS, OTHER)
        for name, build in kind.items()
    }
)

BUILT_ELSEWHERE = frozenset(
    {
        "AudioLDM2UNet2DConditionModel",
        "CogVideoXTransformer3DModel",
        "CogView4Transformer2DModel",
        "DiTTransformer2DModel",
        "Flux2Transformer2DModel",
        "FluxTransformer2DModel",
        "HunyuanDiT2DModel",
        "HunyuanVideoTransformer3DModel",
        "LTXVideoTransformer3DModel",
        "Lumina2Transformer2DModel",
        "PixArtTransformer2DModel",
        "QwenImageTransformer2DModel",
        "SD3Transformer2DModel",
        "SanaTransformer2DModel",
        "StableAudioDiTModel",
        "UNet1DModel",
        "UNet2DConditionModel",
        "UNet2DModel",
        "UNet3DConditionModel",
        "UNetSpatioTemporalConditionModel",
        "WanTransformer3DModel",
        "ZImageTransformer2DModel",
    }
)
