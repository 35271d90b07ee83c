"""CLIP score (arXiv:2104.08718): how well images fit their prompts, by a CLIP model in a local folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from safetensors import SafetensorError
from torch import Tensor

from stepquant.core.digest import tensors_digest, value_digest
from stepquant.errors import EvaluationError

# Of the published preprocessing, where the folder does not say.
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
TEXTS = ("*.json", "*.txt")


@dataclass(frozen=True)
class ClipScore:
    """A CLIP model, its tokenizer, and how it wants images."""

    model: Any
    tokenizer: Any
    digest: str
    side: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def resize(self) -> str:
        return f"bicubic to {self.side}"

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """100 max(cosine, 0) of each image (n, 3, h, w) in [0, 1] and its prompt."""
        if len(images) != len(prompts):
            raise EvaluationError("every image needs its prompt", got=len(prompts), expected=len(images))
        tokens = self.tokenizer(list(prompts), padding=True, truncation=True, return_tensors="pt")
        with torch.no_grad():
            out = self.model(
                input_ids=tokens["input_ids"],
                attention_mask=tokens["attention_mask"],
                pixel_values=self.pixels(images),
            )
        cosine = F.cosine_similarity(out.image_embeds.double(), out.text_embeds.double(), dim=1)
        return 100 * cosine.clamp(min=0)

    def pixels(self, images: Tensor) -> Tensor:
        """The shorter side resized, the middle cut out, normalized."""
        height, width = images.shape[2:]
        share = self.side / min(height, width)
        size = [max(self.side, round(side * share)) for side in (height, width)]
        x = F.interpolate(images.float(), size, mode="bicubic", antialias=True, align_corners=False)
        top, left = ((side - self.side) // 2 for side in size)
        x = x[:, :, top : top + self.side, left : left + self.side].clamp(0, 1)
        mean, std = (torch.tensor(value).reshape(1, 3, 1, 1) for value in (self.mean, self.std))
        return (x - mean) / std


def load_clip(folder: Path) -> ClipScore:
    """From a folder that `transformers` wrote: config.json, model.safetensors, the tokenizer's files."""
    folder = Path(folder)
    try:
        model = transformers.CLIPModel.from_pretrained(folder, local_files_only=True, use_safetensors=True)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        file = folder / "preprocessor_config.json"
        asked = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, SafetensorError) as error:
        words = str(error).strip().splitlines() or [type(error).__name__]
        raise EvaluationError(
            "the CLIP model cannot be loaded",
            where=str(folder),
            got=words[0][:300],
            expected="a folder with config.json, model.safetensors and a tokenizer, as transformers saves them",
        ) from error
    model = model.float().eval().requires_grad_(False)
    side = int(model.config.vision_config.image_size)
    mean, std = (tuple(asked.get(key, usual)) for key, usual in (("image_mean", MEAN), ("image_std", STD)))
    return ClipScore(model, tokenizer, digest_of(model, folder), side, mean, std)


def digest_of(model: Any, folder: Path) -> str:
    """Over the weights and all that says how they are used: the network's configuration, tokens, preprocessing."""
    texts = sorted(file for pattern in TEXTS for file in folder.glob(pattern))
    said = [[file.name, file.read_text(encoding="utf-8")] for file in texts]
    return value_digest([tensors_digest(model.state_dict()), said])[:12]
