"""Train a small classifier on any pictures in the Hugging Face layout, and save it in fp16 with its card.

python examples/train_features.py --data FOLDER --out cifar10_features
python examples/train_features.py --data FOLDER --out characters_features --placed --widths 16,48,128 --features 128
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from data import DEFAULT_DATA, class_names, load_captions, load_split, random_flip
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor, nn

from stepquant.evaluate.networks.classifier import CONFIG_NAME, WEIGHTS_NAME, FeatureNet, load_feature_net
from stepquant.evaluate.speed.calls import fastest_type
from stepquant.runtime.macs import Work

console = Console()

CARD = """---
license: apache-2.0
---

# {data} features

A small convolutional classifier ({millions:.2f} M parameters, fp16) of {classes} classes whose {features} penultimate
features give a Frechet distance for images of {size}x{size}. It is no FID, and compares only with itself.

- Data: {data}, the training split alone.
- Training: {epochs} epochs ({images} images) in {minutes:.0f} minutes on {threads} shared CPU core(s), {dtype}; SGD with
  Nesterov momentum and a one-cycle rate, label smoothing {smoothing}, {augmented}.
- Accuracy on the {tested} test images, with the stored fp16 weights: {accuracy:.2%}.
{fields}- Cost: {mmacs:.1f} million multiply-adds for an image.
"""
FIELDS = """- What else the features tell, by linear heads that were trained with them and dropped: {known} of the fields of
  the captions, on the test images.
"""


@dataclass(frozen=True)
class Examples:
    """Pictures with the number of their class, and with those of the fields of their captions, if they have any."""

    images: Tensor  # (n, 3, h, w), uint8
    labels: Tensor  # (n, 1 + fields)

    @classmethod
    def read(cls, folder: Path, split: str, fields: list[dict[str, int]]) -> Examples:
        images, labels = load_split(folder, split)
        texts = [caption.split(", ") for caption in load_captions(folder, split)]
        columns = [torch.tensor([known[text[i]] for text in texts]) for i, known in enumerate(fields)]
        return cls(images, torch.stack([labels, *columns], 1))


def read_fields(folder: Path) -> list[dict[str, int]]:
    """Numbers of the values of each field of the captions, which stand between commas."""
    texts = [caption.split(", ") for caption in load_captions(folder, "train")]
    return [{value: i for i, value in enumerate(sorted(set(column)))} for column in zip(*texts, strict=True)]


def whiten(net: FeatureNet, images: Tensor) -> None:
    """Sets the stem to the principal components of 2x2 patches, at unit variance, and their negatives."""
    net.mean.copy_(images.mean((0, 2, 3), keepdim=True))
    net.std.copy_(images.std((0, 2, 3), keepdim=True))
    patches = nn.functional.unfold((images[:5000] - net.mean) / net.std, 2).transpose(1, 2).flatten(0, 1)
    values, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))
    filters = (vectors / (values + 5e-4).sqrt()).T.reshape(-1, 3, 2, 2)
    with torch.no_grad():
        net.stem.weight.copy_(torch.cat([filters, -filters]))
        net.stem.bias.zero_()


def start(args: argparse.Namespace, images: Tensor, names: list[str], classes: int) -> FeatureNet:
    """The network of a folder, else a new one; its stem is not trained."""
    if args.init:
        net = load_feature_net(args.init).requires_grad_(True)
    else:
        widths = [int(width) for width in args.widths.split(",")]
        net = FeatureNet(widths, classes, images.shape[-1], args.features, not args.placed, names)
        whiten(net, images[:20_000].float() / 255)
    net.stem.weight.requires_grad_(False)
    return net


def random_shift(images: Tensor, reach: int = 2) -> Tensor:
    """Moves each image by up to `reach` pixels, mirroring what comes in at the border."""
    padded = nn.functional.pad(images.float(), (reach,) * 4, mode="reflect")
    size, count = images.shape[-1], len(images)
    rows = torch.arange(size) + torch.randint(2 * reach + 1, (count, 1))
    columns = torch.arange(size) + torch.randint(2 * reach + 1, (count, 1))
    return padded[torch.arange(count)[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(
        0, 3, 1, 2
    )


def cutout(images: Tensor, fill: Tensor, size: int) -> Tensor:
    """Replaces one square of each image by the mean colour."""
    side = torch.arange(images.shape[-1])
    centres = torch.randint(len(side), (2, len(images), 1))
    rows, columns = (side - centres + size // 2).ge(0) & (side - centres + size // 2).lt(size)
    return torch.where((rows[:, :, None] & columns[:, None, :])[:, None], fill, images)


def soften(images: Tensor) -> Tensor:
    """Mixes each image with its mean over 3x3 pixels and adds noise, both by as much as chance gives."""
    near = nn.functional.avg_pool2d(nn.functional.pad(images, (1,) * 4, mode="replicate"), 3, 1)
    mixed = torch.lerp(images, near, torch.rand(len(images), 1, 1, 1) * 0.7)
    return mixed + torch.randn_like(images) * torch.rand(len(images), 1, 1, 1) * 0.08


def augment(images: Tensor, net: FeatureNet, args: argparse.Namespace) -> Tensor:
    if args.placed:
        return soften(images.float() / 255)
    return cutout(random_shift(random_flip(images)) / 255, net.mean, args.cutout)


@torch.no_grad()
def accuracies(net: FeatureNet, heads: nn.ModuleList, examples: Examples) -> list[float]:
    """Of the classes, and of every field of the captions."""
    right = torch.zeros(1 + len(heads))
    for batch, truth in zip(examples.images.split(500), examples.labels.split(500), strict=True):
        features = net(batch.float() / 255)
        found = torch.stack([head(features).argmax(1) for head in (net.head, *heads)], 1)
        right += (found == truth).sum(0)
    return (right / len(examples.images)).tolist()


def make_optimizer(net: nn.Module, args: argparse.Namespace) -> torch.optim.Optimizer:
    decayed = [weight for weight in net.parameters() if weight.requires_grad and weight.ndim > 1]
    others = [weight for weight in net.parameters() if weight.requires_grad and weight.ndim == 1]
    groups = [{"params": decayed, "weight_decay": 5e-4}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.SGD(groups, args.lr, momentum=0.9, nesterov=True, fused=True)


def train(net: FeatureNet, heads: nn.ModuleList, examples: Examples, args: argparse.Namespace) -> None:
    """One cycle of SGD; the stem stays as it is."""
    images, labels = examples.images, examples.labels
    optimizer = make_optimizer(nn.ModuleList([net, heads]), args)
    each = len(images) // args.batch
    cycle = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        args.lr,
        args.epochs * each,
        pct_start=0.23,
        anneal_strategy="linear",
        cycle_momentum=False,
        div_factor=5,
    )
    criterion = nn.CrossEntropyLoss(label_smoothing=args.smoothing)
    net.train().to(memory_format=torch.channels_last)
    embed = torch.compile(net.forward)
    for epoch in range(args.epochs):
        began, total = time.monotonic(), 0.0
        for index in torch.randperm(len(images)).split(args.batch)[:each]:
            batch = augment(images[index], net, args).contiguous(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16, enabled=fastest_type() == torch.bfloat16):
                features = embed(batch)
                scores = [head(features).float() / 8 for head in (net.head, *heads)]
            losses = [criterion(score, truth) for score, truth in zip(scores, labels[index].T, strict=True)]
            optimizer.zero_grad()
            torch.stack(losses).mean().backward()
            optimizer.step()
            cycle.step()
            total += losses[0].item()
        seconds = time.monotonic() - began
        console.log(f"epoch {epoch + 1} of {args.epochs}: loss {total / each:.4f}, {seconds:.0f} s")


def save(net: FeatureNet, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_NAME).write_text(json.dumps(net.config, indent=2) + "\n")
    kept = {
        name: value for name, value in net.state_dict().items() if not name.endswith("num_batches_tracked")
    }
    save_file({name: value.half().contiguous() for name, value in kept.items()}, folder / WEIGHTS_NAME)
    (folder / WEIGHTS_NAME).chmod(0o644)


def multiplications(net: FeatureNet) -> int:
    """Multiply-adds for one image."""
    with Work() as work:
        net.logits(torch.zeros(1, 3, net.size, net.size))
    return work.macs.total()


def write_card(
    net: FeatureNet, scores: list[float], minutes: float, tested: int, args: argparse.Namespace
) -> None:
    photos = f"flips, shifts by two pixels, cutout of {args.cutout}x{args.cutout}"
    known = ", ".join(f"{score:.1%}" for score in scores[1:])
    numbers = {
        "data": args.data.name,
        "millions": sum(weight.numel() for weight in net.parameters()) / 1e6,
        "classes": net.config["num_classes"],
        "features": net.num_features,
        "size": net.size,
        "augmented": "blur and noise at random" if args.placed else photos,
        "mmacs": multiplications(net) / 1e6,
        "dtype": str(fastest_type()).removeprefix("torch."),
        "fields": FIELDS.format(known=known) if known else "",
    }
    asked = {name: getattr(args, name) for name in ("epochs", "threads", "smoothing")}
    done = {"minutes": minutes, "accuracy": scores[0], "tested": tested, "images": args.images}
    (args.out / "README.md").write_text(CARD.format(**numbers, **asked, **done))


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=DEFAULT_DATA, help="folder of parquet files")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--init", type=Path, help="folder of a FeatureNet to go on from")
    parser.add_argument(
        "--placed",
        action="store_true",
        help="what is in the pictures has its fixed place: blur and noise instead of flips, shifts and cutout",
    )
    parser.add_argument("--widths", default="64,192,256", help="channels of the blocks")
    parser.add_argument("--features", type=int, help="width of a last layer that reads every place")
    parser.add_argument("--cutout", type=int, default=8, help="side of the square that is hidden, 0 for none")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--lr", type=float, default=0.5)
    parser.add_argument("--smoothing", type=float, default=0.2)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    return parser.parse_args()


def main() -> None:
    args = read_arguments()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    fields = read_fields(args.data)
    examples = Examples.read(args.data, "train", fields)
    args.images = args.epochs * len(examples.images)
    classes = int(examples.labels[:, 0].max()) + 1
    net = start(args, examples.images, class_names(args.data), classes)
    heads = nn.ModuleList(nn.Linear(net.num_features, len(known)) for known in fields)
    began = time.monotonic()
    train(net, heads, examples, args)
    minutes = (time.monotonic() - began) / 60
    save(net, args.out)
    stored, test = load_feature_net(args.out), Examples.read(args.data, "test", fields)
    scores = accuracies(stored, heads, test)
    write_card(stored, scores, minutes, len(test.images), args)
    console.log(f"accuracy {scores[0]:.2%} after {minutes:.0f} minutes; fields of captions {scores[1:]}")


if __name__ == "__main__":
    main()
