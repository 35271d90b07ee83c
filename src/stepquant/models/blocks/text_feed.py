"""Feed-forwards of text encoders that ask the weight of their last layer for a dtype, which packed bytes do not have."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

# By name: importing the classes would import all that transformers needs for them.
PLAIN = tuple(f"{model}DenseActDense" for model in ("T5", "UMT5", "MT5"))
GATED = tuple(f"{model}DenseGatedActDense" for model in ("T5", "UMT5", "MT5"))


@dataclass(frozen=True)
class TextFeed:
    """wi -> activation -> wo, or activation of wi_0 times wi_1 -> wo."""

    path: str
    gated: bool


def is_text_feed(module: nn.Module) -> bool:
    ours = type(module).__module__.startswith("transformers.")
    return ours and type(module).__name__ in PLAIN + GATED


def text_feed(path: str, module: nn.Module) -> TextFeed:
    return TextFeed(path, type(module).__name__ in GATED)
