from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from stepquant.errors import EvaluationError
from stepquant.evaluate.networks.clip import MEAN, STD, ClipScore, load_clip

PROMPTS = ["a cat", "the dog runs"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_clip(tmp_path_factory.mktemp("clip"))


def make_clip(where: Path) -> Path:
    """A CLIP model with random weights as transformers saves it."""
    torch.manual_seed(0)
    vocabulary = {"<|startoftext|>": 0, "<|endoftext|>": 1}
    for letter in "abcdefghijklmnopqrstuvwxyz":
        vocabulary |= {letter: len(vocabulary), f"{letter}</w>": len(vocabulary) + 1}
    tokenizer = transformers.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=16)
    tokenizer.save_pretrained(where)
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = tower | {
        "vocab_size": 64,
        "max_position_embeddings": 16,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }
    config = transformers.CLIPConfig(
        text_config=text, vision_config=tower | {"image_size": 24, "patch_size": 8}, projection_dim=8
    )
    transformers.CLIPModel(config).save_pretrained(where)
    return where


@pytest.fixture(scope="module")
def clip(folder: Path) -> ClipScore:
    return load_clip(folder)


def test_score_is_the_cosine_of_the_two_towers(clip: ClipScore) -> None:
    images = torch.rand(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    found = clip(images, PROMPTS)
    mean, std = (torch.tensor(x).reshape(1, 3, 1, 1) for x in (MEAN, STD))
    with torch.no_grad():
        seen = clip.model.vision_model((images - mean) / std).pooler_output
        image = clip.model.visual_projection(seen)
        for row, prompt in enumerate(PROMPTS):  # one at a time: no padding
            read = clip.model.text_model(**clip.tokenizer([prompt], return_tensors="pt")).pooler_output
            text = clip.model.text_projection(read)[0]
            cosine = float(image[row] @ text / image[row].norm() / text.norm())
            assert float(found[row]) == pytest.approx(100 * max(cosine, 0), abs=1e-3)
    assert clip.resize == "bicubic to 24"
    assert len(clip.digest) == 12


def test_the_digest_is_that_of_all_that_decides_the_score(folder: Path, tmp_path: Path) -> None:
    digest = load_clip(folder).digest
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    assert load_clip(tmp_path).digest == digest
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5]}')
    assert load_clip(tmp_path).digest != digest


def test_images_are_resized_as_pillow_does_and_cut_in_the_middle(clip: ClipScore) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (60, 48, 3), dtype=np.uint8)
    whole = Image.fromarray(pixels).resize((24, 30), Image.Resampling.BICUBIC).crop((0, 3, 24, 27))
    expected = (np.asarray(whole) / 255 - MEAN) / STD
    images = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255
    found = clip.pixels(images)[0].permute(1, 2, 0).numpy()
    np.testing.assert_allclose(found, expected, atol=1.5 / 255 / min(STD))


def test_bad_input_is_one_clear_error(clip: ClipScore, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="needs its prompt"):
        clip(torch.rand(3, 3, 24, 24), PROMPTS)
    with pytest.raises(EvaluationError, match="cannot be loaded") as error:
        load_clip(tmp_path)
    assert str(tmp_path) in str(error.value)
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:200])
    with pytest.raises(EvaluationError, match="cannot be loaded"):
        load_clip(tmp_path)
