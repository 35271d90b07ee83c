"""Exported model classes that denoise nothing, each with what it is instead."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

CONTROL = "hands a denoiser what to add inside it, and predicts nothing itself"
SEVERAL = "a list of such models, whose additions it sums"

NO_DENOISERS: Mapping[str, str] = MappingProxyType(
    {
        "AceStepAudioTokenDetokenizer": "turns tokens of sound back into latents",
        "AceStepAudioTokenizer": "turns latents of sound into tokens",
        "AceStepConditionEncoder": "encodes the words, the lyrics and the timbre",
        "AnimaTextConditioner": "encodes the text",
        "AudioLDM2ProjectionModel": "brings two text encoders to one width",
        "CLIPImageProjection": "projects an embedding of an image",
        "ControlNetModel": CONTROL,
        "ControlNetUnionModel": CONTROL,
        "ControlNetXSAdapter": "the half of UNetControlNetXSModel that cannot run alone",
        "CosmosControlNetModel": CONTROL,
        "DreamLiteTransformer2DModel": "a layer of DreamLiteUNetModel",
        "FluxControlNetModel": CONTROL,
        "FluxMultiControlNetModel": SEVERAL,
        "HunyuanDiT2DControlNetModel": CONTROL,
        "HunyuanDiT2DMultiControlNetModel": SEVERAL,
        "Ideogram4PromptEnhancerHead": "the head of a language model that rewrites the prompt",
        "Kandinsky6SRLatentUpscalerBank": "enlarges latents in one pass, without a time",
        "MiniMaxMusic3ConditionEncoder": "encodes what the music is conditioned on",
        "MiniMaxMusic3RVQDepthDecoder": "decodes tokens one after the other, without noise",
        "MotionAdapter": "the layers that UNetMotionModel takes in, without a forward of its own",
        "MultiAdapter": SEVERAL,
        "MultiControlNetModel": SEVERAL,
        "QwenImageControlNetModel": CONTROL,
        "QwenImageMultiControlNetModel": SEVERAL,
        "ReduxImageEncoder": "encodes an image into tokens of text",
        "SD3ControlNetModel": CONTROL,
        "SD3MultiControlNetModel": SEVERAL,
        "SanaControlNetModel": CONTROL,
        "SparseControlNetModel": CONTROL,
        "StableAudio3DurationEmbedder": "embeds a duration",
        "StableAudioProjectionModel": "projects the text and the two ends of the sound",
        "T2IAdapter": CONTROL,
        "Transformer2DModel": "a layer of U-Nets; one that denoises by itself is loaded as DiT or PixArt",
        "TransformerTemporalModel": "a layer of video UNets that reads no time with any of its norms",
        "UVit2DModel": "fills in masked tokens, and reads neither noise nor a time",
        "UniDiffuserTextDecoder": "decodes words one after the other, without noise",
        "ZImageControlNetModel": CONTROL,
    }
)

# Classes that no sizes make small enough to run in a test.
NOT_TINY: Mapping[str, str] = MappingProxyType({})
