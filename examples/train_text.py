"""Train a text-to-image model on captions and latents, and export it as an ordinary `StableDiffusionPipeline`.

    python examples/train_text.py train --data ../shared/data/characters32 --autoencoder runs/autoencoder --run runs/text
    python examples/train_text.py export --run runs/text --autoencoder runs/autoencoder --out characters-text

The tokenizer knows the words of the training captions, and one token for all others. Ctrl-C or SIGTERM saves and
stops; the same command goes on from there.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import torch
from data import draws, grid, load_captions, load_pictures, pad_to
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from export import add_latent_arguments, finish, load_average, train_and_export
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from train_autoencoder import latents_of
from training import SCHEDULER, Loss, Trainer, add_arguments, main, run
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

BEGIN, END, UNKNOWN = SPECIAL = ("<begin>", "<end>", "<unknown>")
LENGTH = 20  # tokens of a prompt; the longest caption has 16 words
LEFT_OUT = 0.1
PROMPTS = 256  # that come with the model, for those who calibrate it
GUIDANCE = 7.5  # the default of StableDiffusionPipeline
UNET = {
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (32, 64, 128),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 128,
    "attention_head_dim": (1, 2, 4),  # diffusers reads it as the number of heads, which are 32 wide here
    "norm_num_groups": 8,
}
TEXT = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
# What StableDiffusionPipeline asks of its scheduler.
STABLE = SCHEDULER | {"steps_offset": 1, "set_alpha_to_one": False}
CARD = """---
license: {license}
library_name: diffusers
pipeline_tag: text-to-image
---

# {title}

Text to image at {side}x{side}: a U-Net with cross-attention ({millions:.1f} M parameters, channels 32-64-128) on the latents of
its own autoencoder, a CLIP text encoder (width 128, two layers) trained with it, a tokenizer of {words} words. v-prediction,
1000 linear-beta steps. An ordinary diffusers `StableDiffusionPipeline`:
`pipe("{example}", guidance_scale={guidance})`.

- Seen: {seen:,} images in {hours:.1f} hours{processor}.
- Last loss (of v, {target}): {loss:.4f}.
- Words it does not know become one token for all of them.

![{samples} samples of DDIM with 50 steps from consecutive seeds, test captions, guidance {guidance}, not selected](samples.png)
"""


def word_tokenizer(captions: list[str]) -> PreTrainedTokenizerFast:
    """One token a word, commas and case aside."""
    split = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(",", behavior="removed")]
    )
    words = {word for text in captions for word, _ in split.pre_tokenize_str(text.lower())}
    vocabulary = {word: index for index, word in enumerate([*SPECIAL, *sorted(words)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), split
    ends = [(BEGIN, vocabulary[BEGIN]), (END, vocabulary[END])]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BEGIN} $A {END}", special_tokens=ends)
    special = {"bos_token": BEGIN, "eos_token": END, "pad_token": END, "unk_token": UNKNOWN}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=LENGTH, **special)


def tokenize(tokenizer: PreTrainedTokenizerFast, captions: list[str]) -> Tensor:
    """Numbers of tokens (n, LENGTH); unknown words are said once."""
    tokens = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
    if unknown := int((tokens == tokenizer.unk_token_id).sum()):
        rows = int((tokens == tokenizer.unk_token_id).any(1).sum())
        warnings.warn(
            f"{unknown} words in {rows} of {len(captions)} captions are unknown to the tokenizer",
            stacklevel=2,
        )
    return tokens


def build(tokenizer: PreTrainedTokenizerFast, side: int) -> dict[str, nn.Module]:
    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    config = CLIPTextConfig(vocab_size=len(tokenizer), max_position_embeddings=LENGTH, **special, **TEXT)
    unet = UNet2DConditionModel(sample_size=side, **UNET)
    nn.init.zeros_(unet.conv_out.weight)
    return {"unet": unet, "text_encoder": CLIPTextModel(config)}


def pipeline(
    networks: nn.ModuleDict, autoencoder: AutoencoderKL, tokenizer: PreTrainedTokenizerFast
) -> StableDiffusionPipeline:
    parts = {"vae": autoencoder, "tokenizer": tokenizer, "scheduler": DDIMScheduler(**STABLE), **networks}
    pipe = StableDiffusionPipeline(
        **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(pipe: StableDiffusionPipeline, prompts: list[str], guidance: float, steps: int) -> list:
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(prompts))]
    return pipe(prompts, generator=generators, num_inference_steps=steps, guidance_scale=guidance).images


def train(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    pictures = load_pictures(args.data, "train", captions=True)
    autoencoder, latents = latents_of(args.autoencoder, pad_to(pictures.images, 8))
    tokenizer = word_tokenizer(pictures.captions)
    tokens, nothing = tokenize(tokenizer, pictures.captions), tokenize(tokenizer, [""])
    trainer = Trainer(build(tokenizer, latents.shape[-1]), args)
    shown = load_pictures(args.data, "test", 16, captions=True).captions
    loss_of, order = Loss(), draws(len(latents), args.batch)
    unet, text_encoder = trainer.networks["unet"], trainer.networks["text_encoder"]

    def loss() -> Tensor:
        index = next(order)
        words = torch.where(torch.rand(len(index), 1) < LEFT_OUT, nothing, tokens[index]).to(args.device)
        clean = latents[index].to(args.device, memory_format=torch.channels_last)
        return loss_of(lambda noisy, t: unet(noisy, t, text_encoder(words)[0], return_dict=False)[0], clean)

    def show(networks: nn.ModuleDict, file: Path) -> None:
        drawn = sample(pipeline(networks.cpu(), autoencoder, tokenizer), shown, GUIDANCE, 25)
        networks.to(args.device)
        grid(drawn, 8, 3).save(file)

    run(trainer, loss, show)


def export(args: argparse.Namespace) -> None:
    """The averaged weights with their autoencoder as a pipeline folder in fp16, with its card and a grid of samples."""
    configs, weights, state = load_average(args.run)
    pictures = load_pictures(args.data, "train", captions=True)
    tokenizer = word_tokenizer(pictures.captions)
    autoencoder = latents_of(args.autoencoder, pad_to(pictures.images, 8))[0]
    text_config = CLIPTextConfig(**configs["text_encoder"])
    networks = nn.ModuleDict(
        {"unet": UNet2DConditionModel(**configs["unet"]), "text_encoder": CLIPTextModel(text_config)}
    )
    for name, network in networks.items():
        network.load_state_dict(weights[name])
    # transformers loads a text encoder in the type of its file, diffusers the rest in float32.
    networks["unet"].half()
    pipeline(networks, autoencoder.half(), tokenizer).save_pretrained(args.out)
    prompts = load_captions(args.data, "test")
    (args.out / "prompts.txt").write_text("\n".join(prompts[:PROMPTS]) + "\n", encoding="utf-8")
    pipe = pipeline(networks.float().eval(), autoencoder.float(), tokenizer)
    facts = {"side": pictures.images.shape[-1], "words": len(tokenizer), "example": prompts[0]}
    images = sample(pipe, prompts[: args.samples], args.guidance, 50)
    finish(args, CARD, state, networks["unet"], images, guidance=args.guidance, **facts)


def parser() -> argparse.ArgumentParser:
    parser, training, exporting = train_and_export(
        __doc__, train, export, title="Characters from text", run=Path("runs/characters-text")
    )
    add_arguments(training, images=400_000, cooldown=200_000, lr=1e-3)
    add_latent_arguments(training, exporting, GUIDANCE)
    return parser


if __name__ == "__main__":
    main(parser())
