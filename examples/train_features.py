"""Train the small CIFAR-10 classifier behind FD-C10, and save it in fp16 with its card.

python examples/train_features.py --data FOLDER --out cifar10_features
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import torch
from data import DEFAULT_DATA, load_split, random_flip
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor, nn

from stepquant.evaluate.feature_net import CONFIG_NAME, WEIGHTS_NAME, FeatureNet, load_feature_net

console = Console()

CARD = """---
license: apache-2.0
---

# CIFAR-10 features

A small convolutional classifier ({millions:.2f} M parameters, fp16) whose {features} penultimate features
give FD-C10, the Frechet distance that stepquant reports for 32x32 images. It is no FID, and compares only
with itself.

- Data: CIFAR-10, JPEG at quality 75 re-encoded from the originals, the training split alone.
- Training: {epochs} epochs ({images} images) in {minutes:.0f} minutes on two shared CPU cores, bf16; SGD with
  Nesterov momentum and a one-cycle rate, label smoothing {smoothing}, flips, shifts by two pixels, cutout.
- Accuracy on the 10,000 test images, with the stored fp16 weights: {accuracy:.2%} (features and
  logits are averaged over each image and its mirror image).
- Cost: {gflops:.2f} GFLOP per image forward.
"""


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


def start(folder: Path | None, images: Tensor) -> FeatureNet:
    """The network of a folder, else a new one; its stem is not trained."""
    if folder:
        net = load_feature_net(folder).requires_grad_(True)
    else:
        net = FeatureNet()
        whiten(net, images.float() / 255)
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


@torch.no_grad()
def accuracy(net: FeatureNet, images: Tensor, labels: Tensor) -> float:
    right = 0
    for batch, truth in zip(images.split(500), labels.split(500), strict=True):
        right += int((net.logits(batch.float() / 255).argmax(1) == truth).sum())
    return right / len(labels)


def train(net: FeatureNet, images: Tensor, labels: Tensor, args: argparse.Namespace) -> None:
    """One cycle of SGD; the stem stays as it is."""
    decayed = [weight for weight in net.parameters() if weight.requires_grad and weight.ndim > 1]
    others = [weight for weight in net.parameters() if weight.requires_grad and weight.ndim == 1]
    groups = [{"params": decayed, "weight_decay": 5e-4}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, args.lr, momentum=0.9, nesterov=True, fused=True)
    steps = args.epochs * (len(images) // args.batch)
    cycle = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        args.lr,
        steps,
        pct_start=0.23,
        anneal_strategy="linear",
        cycle_momentum=False,
        div_factor=5,
    )
    logits = torch.compile(net.logits)
    criterion = nn.CrossEntropyLoss(label_smoothing=args.smoothing)
    net.train().to(memory_format=torch.channels_last)
    for epoch in range(args.epochs):
        began, total = time.monotonic(), 0.0
        for index in torch.randperm(len(images)).split(args.batch)[: len(images) // args.batch]:
            batch = cutout(random_shift(random_flip(images[index])) / 255, net.mean, args.cutout)
            with torch.autocast("cpu", torch.bfloat16):
                scores = logits(batch.contiguous(memory_format=torch.channels_last))
            loss = criterion(scores.float(), labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            cycle.step()
            total += loss.item()
        seconds, mean = time.monotonic() - began, total / (len(images) // args.batch)
        console.log(f"epoch {epoch + 1} of {args.epochs}: loss {mean:.4f}, {seconds:.0f} s")


def save(net: FeatureNet, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_NAME).write_text(json.dumps(net.config, indent=2) + "\n")
    kept = {
        name: value for name, value in net.state_dict().items() if not name.endswith("num_batches_tracked")
    }
    save_file({name: value.half().contiguous() for name, value in kept.items()}, folder / WEIGHTS_NAME)
    (folder / WEIGHTS_NAME).chmod(0o644)


def multiplications(net: FeatureNet) -> int:
    """Multiply-adds of the convolutions for one image."""
    counted: list[int] = []
    hooks = [
        layer.register_forward_hook(
            lambda layer, _, out: counted.append(layer.weight.numel() * out[0, 0].numel())
        )
        for layer in net.modules()
        if isinstance(layer, nn.Conv2d)
    ]
    net(torch.zeros(1, 3, 32, 32))
    for hook in hooks:
        hook.remove()
    return sum(counted)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=DEFAULT_DATA, help="folder of parquet files")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--init", type=Path, help="folder of a FeatureNet to go on from")
    parser.add_argument("--cutout", type=int, default=8, help="side of the square that is hidden, 0 for none")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--lr", type=float, default=0.5)
    parser.add_argument("--smoothing", type=float, default=0.2)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    images, labels = load_split(args.data, "train")
    net = start(args.init, images)
    began = time.monotonic()
    train(net, images, labels, args)
    minutes = (time.monotonic() - began) / 60
    save(net, args.out)
    stored = load_feature_net(args.out)
    score = accuracy(stored, *load_split(args.data, "test"))
    numbers = {
        "millions": sum(weight.numel() for weight in stored.parameters()) / 1e6,
        "features": stored.num_features,
        "images": args.epochs * len(images),
        "gflops": 2 * multiplications(stored) / 1e9,
    }
    card = CARD.format(
        **numbers, minutes=minutes, accuracy=score, epochs=args.epochs, smoothing=args.smoothing
    )
    (args.out / "README.md").write_text(card)
    console.log(f"accuracy {score:.2%} after {minutes:.0f} minutes")


if __name__ == "__main__":
    main()
