"""Train the embedded unconditional CIFAR-10 U-Net, and export it as an ordinary diffusers pipeline.

    python examples/train_cifar10.py train --data FOLDER --run runs/cifar10 --images 2000000 --cooldown 300000
    python examples/train_cifar10.py export --run runs/cifar10 --out cifar10

Ctrl-C or SIGTERM saves and stops; the same command goes on from there. To finish early, run it again with
a smaller `--images`: the learning rate then falls to zero over `--cooldown` images from where it stands.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import signal
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from data import DEFAULT_DATA, batches, grid, load_split
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from diffusers.models.attention_processor import Attention, AttnProcessor
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

console = Console()

UNET = {
    "sample_size": 32,
    "block_out_channels": (32, 64, 128, 256),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    "attention_head_dim": 32,
    "norm_num_groups": 16,
}
SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_schedule": "linear",
    "prediction_type": "v_prediction",
    "clip_sample": True,
}
BETAS = (0.9, 0.99)
LOG_SIGMA = (-0.6, 1.4)  # mean and deviation
CARD = """---
license: apache-2.0
library_name: diffusers
---

# CIFAR-10 U-Net

An unconditional DDPM U-Net for 32x32 images: {millions:.1f} M parameters, channels 32-64-128-256, one layer a
block, attention at 8x8, v-prediction, 1000 linear-beta steps. An ordinary diffusers `DDIMPipeline`.

- Seen: {seen} images in {hours:.2f} hours, on top of any starting weights.
- Last loss (of v, plain mean): {loss:.4f}.

![64 samples of DDIM with 50 steps, not selected](samples.png)
"""


@dataclass
class State:
    """What a checkpoint tells about the training so far."""

    seen: int = 0
    seconds: float = 0.0
    loss: float = 0.0
    cooldown_from: int | None = None


def load_unet(folder: Path | None) -> UNet2DModel:
    return UNet2DModel.from_pretrained(folder).float() if folder else UNet2DModel(**UNET)


def prepare(unet: UNet2DModel) -> UNet2DModel:
    """Channels-last, and attention as plain products, whose gradient is faster over 64 tokens."""
    for module in unet.modules():
        if isinstance(module, Attention):
            module.set_processor(AttnProcessor())
    return unet.to(memory_format=torch.channels_last)


class Optimizer:
    """Muon for the matrices between the first and the last layer, AdamW for the rest, at one learning rate.

    Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) makes the singular values of a step equal. Scaled as
    AdamW's steps are (Liu et al. 2025, arXiv:2502.16982, eq. 4), it takes AdamW's rates.
    """

    def __init__(self, unet: UNet2DModel, rate: float) -> None:
        rest, self.weights = [], []
        for name, weight in unet.named_parameters():
            inner = weight.dim() > 1 and not name.startswith(("conv_in", "conv_out"))
            (self.weights if inner else rest).append(weight)
        # In the same memory as the weights, which lie channels-last.
        self.matrices = [torch.nn.Parameter(pixels_last(w.detach()).view(len(w), -1)) for w in self.weights]
        self.parts = {
            "muon": torch.optim.Muon(self.matrices, rate, 0.0, adjust_lr_fn="match_rms_adamw"),
            "adamw": torch.optim.AdamW(rest, rate, BETAS, weight_decay=0.0, fused=True),
        }

    def step(self, rate: float) -> None:
        for matrix, weight in zip(self.matrices, self.weights):
            matrix.grad = pixels_last(weight.grad).reshape(matrix.shape)
        for part in self.parts.values():
            for group in part.param_groups:
                group["lr"] = rate
            part.step()

    def tensors(self) -> dict[str, Tensor]:
        return {
            f"{name}.{index}.{key}": value
            for name, part in self.parts.items()
            for index, slots in part.state_dict()["state"].items()
            for key, value in slots.items()
        }

    def restore(self, tensors: dict[str, Tensor]) -> None:
        for name, part in self.parts.items():
            slots: dict[int, dict[str, Tensor]] = {}
            for key, value in tensors.items():
                owner, index, slot = key.split(".")
                if owner == name:
                    slots.setdefault(int(index), {})[slot] = value
            part.load_state_dict(part.state_dict() | {"state": slots})


def pixels_last(weight: Tensor) -> Tensor:
    return weight.permute(0, 2, 3, 1) if weight.dim() == 4 else weight


def save_checkpoint(
    file: Path, unet: UNet2DModel, ema: UNet2DModel, optimizer: Optimizer, state: State
) -> None:
    """One safetensors file with the state as JSON in its header, so that a single rename replaces it all."""
    tensors = {f"raw.{name}": value for name, value in unet.state_dict().items()}
    tensors |= {f"ema.{name}": value for name, value in ema.state_dict().items()}
    tensors |= {f"optimizer.{name}": value for name, value in optimizer.tensors().items()}
    unet_config = {key: value for key, value in unet.config.items() if not key.startswith("_")}
    metadata = {"state": json.dumps(asdict(state)), "unet": json.dumps(unet_config)}
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".partial")
    save_file({name: value.contiguous() for name, value in tensors.items()}, temporary, metadata)
    os.replace(temporary, file)


def read_checkpoint(file: Path) -> tuple[dict[str, dict[str, Tensor]], dict, State]:
    """The tensors by group (raw, ema, optimizer), the U-Net's configuration, and the state."""
    groups: dict[str, dict[str, Tensor]] = {"raw": {}, "ema": {}, "optimizer": {}}
    with safe_open(file, framework="pt") as stored:
        metadata = stored.metadata()
        for key in stored.keys():  # noqa: SIM118, the file handle is no dict
            group, name = key.split(".", 1)
            groups[group][name] = stored.get_tensor(key)
    return groups, json.loads(metadata["unet"]), State(**json.loads(metadata["state"]))


def learning_rate(args: argparse.Namespace, state: State) -> float:
    """Linear warm-up, a constant, then a linear fall to zero once the cooldown has begun."""
    left = 1.0
    if state.cooldown_from is not None:
        left = max(0.0, 1 - (state.seen - state.cooldown_from) / max(args.cooldown, 1))
    return args.lr * min(1.0, (state.seen + args.batch) / max(args.warmup, 1)) * left


def densities() -> Tensor:
    """How often each time step is trained on: half evenly, half by how much an image decides there.

    Half of the linear steps hold hardly anything but noise. Karras et al. 2022 (arXiv:2206.00364, table 1) draw the
    logarithm of sigma, noise over signal, from a normal distribution; theirs has data of deviation 0.5.
    """
    kept = DDIMScheduler(**SCHEDULER).alphas_cumprod.double()
    logarithm = ((1 - kept) / kept).log() / 2
    width = torch.gradient(logarithm)[0]
    normal = width * (-0.5 * ((logarithm - LOG_SIGMA[0]) / LOG_SIGMA[1]).square()).exp()
    return (normal / normal.sum() + 1 / len(kept)) / 2


class Loss:
    """Squared error of v = signal * noise - sigma * image (Salimans and Ho 2022, arXiv:2202.00512, appendix D).

    A network that predicts the noise must copy its input almost exactly where all is noise, which took more images
    than were to be had; v asks for the noise where the image is known and for the image where the noise is.
    The time steps of a batch are stratified, which lowers the variance for nothing.
    """

    def __init__(self) -> None:
        self.scheduler = DDIMScheduler(**SCHEDULER)
        self.below = densities().cumsum(0).float()

    def __call__(self, model: torch.nn.Module, clean: Tensor) -> Tensor:
        noise, size = torch.randn_like(clean), len(clean)
        steps = torch.searchsorted(self.below, (torch.arange(size) + torch.rand(size)) / size)
        steps = steps.clamp(max=len(self.below) - 1)
        noisy = self.scheduler.add_noise(clean, noise, steps)
        with torch.autocast("cpu", torch.bfloat16):
            predicted = model(noisy, steps, return_dict=False)[0]
        return (predicted.float() - self.scheduler.get_velocity(clean, noise, steps)).square().mean()


def start(args: argparse.Namespace) -> tuple[UNet2DModel, UNet2DModel, Optimizer, State]:
    """From the run's checkpoint where there is one, else from --init, else from scratch."""
    file = args.run / "checkpoint.safetensors"
    if not file.exists():
        unet = prepare(load_unet(args.init))
        if args.new_output:
            torch.nn.init.zeros_(unet.conv_out.weight)
            torch.nn.init.zeros_(unet.conv_out.bias)
        ema = load_unet(args.init_ema) if args.init_ema else copy.deepcopy(unet)
        return unet, ema, Optimizer(unet, args.lr), State()
    groups, config, state = read_checkpoint(file)
    unet = prepare(UNet2DModel(**config))
    ema = copy.deepcopy(unet)
    unet.load_state_dict(groups["raw"])
    ema.load_state_dict(groups["ema"])
    optimizer = Optimizer(unet, args.lr)
    optimizer.restore(groups["optimizer"])
    console.log(f"going on from {state}")
    return unet, ema, optimizer, state


class Trainer:
    """The weights, their average, the optimizer and the state, advanced one batch at a time."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.file = args, args.run / "checkpoint.safetensors"
        self.unet, self.ema, self.optimizer, self.state = start(args)
        self.weights = list(self.unet.parameters())
        self.averages = list(self.ema.requires_grad_(False).parameters())
        self.model = torch.compile(self.unet) if args.compile else self.unet
        self.loss_of = Loss()

    @property
    def last_image(self) -> int:
        begin = self.state.cooldown_from
        return (max(self.args.images, self.state.seen) if begin is None else begin) + self.args.cooldown

    def step(self, clean: Tensor) -> float:
        """One update; returns the learning rate it used."""
        state = self.state
        if state.cooldown_from is None and state.seen >= self.args.images:
            state.cooldown_from = state.seen
        rate = learning_rate(self.args, state)
        loss = self.loss_of(self.model, clean)
        self.unet.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
        self.optimizer.step(rate)
        torch._foreach_lerp_(self.averages, [weight.detach() for weight in self.weights], 1 - self.args.ema)
        state.seen += len(clean)
        state.loss += (loss.item() - state.loss) * (0.01 if state.loss else 1.0)
        return rate

    def save(self) -> None:
        save_checkpoint(self.file, self.unet, self.ema, self.optimizer, self.state)


def train(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    trainer, feed = Trainer(args), batches(load_split(args.data, "train")[0], args.batch)
    state, stop = trainer.state, []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda received, _: stop.append(received))
    clock = last_saved = last_logged = time.monotonic()
    seen_then = state.seen
    columns = TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn(elapsed_when_finished=True)
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("training")
        while state.seen < trainer.last_image and not stop:
            rate = trainer.step(next(feed))
            now = time.monotonic()
            state.seconds, clock = state.seconds + now - clock, now
            progress.update(bar, completed=state.seen, total=trainer.last_image)
            if now - last_logged > 60:
                speed = (state.seen - seen_then) / (now - last_logged)
                console.log(
                    f"{state.seen} images, loss {state.loss:.4f}, lr {rate:.1e}, {speed:.0f} images/s"
                )
                last_logged, seen_then = now, state.seen
            if now - last_saved > 60 * args.save_minutes:
                trainer.save()
                last_saved = now
    trainer.save()
    console.log(f"saved at {state.seen} images, loss {state.loss:.4f}")


def export(args: argparse.Namespace) -> None:
    """The averaged weights as a pipeline folder in fp16, with its card and a grid of samples."""
    groups, config, state = read_checkpoint(args.run / "checkpoint.safetensors")
    unet = UNet2DModel(**config)
    unet.load_state_dict(groups["ema"])
    pipeline = DDIMPipeline(unet.half(), DDIMScheduler(**SCHEDULER))
    pipeline.save_pretrained(args.out)
    weights = args.out / "unet" / "diffusion_pytorch_model.safetensors"
    weights.chmod(0o644)
    unet.float()
    images = pipeline(64, generator=torch.Generator().manual_seed(0), num_inference_steps=50).images
    grid(images).save(args.out / "samples.png")
    millions = sum(weight.numel() for weight in unet.parameters()) / 1e6
    card = CARD.format(millions=millions, hours=state.seconds / 3600, **asdict(state))
    (args.out / "README.md").write_text(card)
    console.log(f"wrote {args.out}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    training = commands.add_parser("train")
    training.set_defaults(command=train)
    training.add_argument("--data", type=Path, default=DEFAULT_DATA, help="folder of parquet files")
    training.add_argument("--init", type=Path, help="folder of a UNet2DModel to start from")
    training.add_argument(
        "--new-output",
        action="store_true",
        help="the last layer of --init predicted something else: it starts at zero",
    )
    training.add_argument("--init-ema", type=Path, help="folder of its averaged weights, if they differ")
    training.add_argument("--images", type=int, default=2_000_000, help="images before the cooldown")
    training.add_argument("--cooldown", type=int, default=300_000, help="images over which lr falls to zero")
    training.add_argument("--warmup", type=int, default=25_000, help="images over which lr rises")
    training.add_argument("--batch", type=int, default=64)
    training.add_argument("--lr", type=float, default=4e-4)
    training.add_argument("--ema", type=float, default=0.999)
    training.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    training.add_argument("--save-minutes", type=float, default=4.0)
    training.add_argument("--no-compile", dest="compile", action="store_false")
    exporting = commands.add_parser("export")
    exporting.set_defaults(command=export)
    exporting.add_argument("--out", type=Path, required=True, help="the pipeline folder to write")
    for command in (training, exporting):
        command.add_argument(
            "--run", type=Path, default=Path("runs/cifar10"), help="folder of the checkpoint"
        )
    args = parser.parse_args()
    if args.command is train and args.new_output and args.init_ema:
        parser.error("--new-output begins a new average: leave --init-ema out")
    return args


if __name__ == "__main__":
    arguments = parse()
    arguments.command(arguments)
