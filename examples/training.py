"""What the trainers of generative models share: the optimizer, the averaged weights, checkpoints and the loop.

A trainer gives its networks by name and a loss of one batch; everything else is here.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from data import DataError
from diffusers import DDIMScheduler
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from stepquant.core.precision import multiplies_bf16

console = Console()

SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_schedule": "linear",
    "prediction_type": "v_prediction",
    "clip_sample": False,
}
BETAS = (0.9, 0.98)
MOMENTUM = 0.95
LOG_SIGMA = (-0.6, 1.4)  # mean and deviation
EVENLY = 0.25
HIDDEN = 25.0  # signal over noise, squared, above which an error counts less
CHECKPOINT = "checkpoint.safetensors"
GROUPS = ("raw", "ema", "optimizer")


@dataclass
class State:
    """What a checkpoint tells about the training so far."""

    seen: int = 0
    seconds: float = 0.0
    loss: float = 0.0
    target: str = "weighted by step"  # what the loss is
    cooldown_from: int | None = None


class Muon(torch.optim.Optimizer):
    """Steps whose singular values are nearly equal (Jordan et al. 2024, kellerjordan.github.io/posts/muon).

    Scaled as AdamW's steps are (Liu et al. 2025, arXiv:2502.16982, eq. 4), it takes AdamW's rates.
    torch.optim.Muon does the same in bfloat16, which takes three times as long where the processor has no bfloat16.
    """

    def __init__(self, matrices: list[nn.Parameter], lr: float) -> None:
        super().__init__(matrices, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for matrix in group["params"]:
                if matrix.grad is None:
                    continue
                slots = self.state[matrix]
                mean = slots.setdefault("momentum_buffer", torch.zeros_like(matrix))
                mean.lerp_(matrix.grad, 1 - MOMENTUM)
                step = orthogonal(matrix.grad.lerp(mean, MOMENTUM))
                matrix.sub_(step, alpha=group["lr"] * 0.2 * max(matrix.shape) ** 0.5)


def orthogonal(matrix: Tensor) -> Tensor:
    """Newton-Schulz: five rounds of an odd polynomial that takes the singular values near one."""
    if multiplies_bf16(matrix.device):
        matrix = matrix.bfloat16()
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = wide / wide.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * (gram @ gram)) @ x
    return (x if wide is matrix else x.T).float()


class Optimizer:
    """Muon for the matrices inside the networks, AdamW for the rest, at one learning rate.

    First and last layers and tables of embeddings, where a row stands for itself, stay with AdamW.
    """

    def __init__(self, networks: nn.ModuleDict, rate: float) -> None:
        rest, self.weights = [], []
        outer = {id(weight) for network in networks.values() for weight in outer_weights(network)}
        for weight in networks.parameters():
            inner = weight.dim() > 1 and id(weight) not in outer
            (self.weights if inner else rest).append(weight)
        # In the same memory as the weights, which lie channels-last.
        self.matrices = [nn.Parameter(pixels_last(w.detach()).view(len(w), -1)) for w in self.weights]
        self.parts: dict[str, torch.optim.Optimizer] = {
            "muon": Muon(self.matrices, rate),
            "adamw": torch.optim.AdamW(rest, rate, BETAS, weight_decay=0.0, fused=True),
        }

    def step(self, rate: float) -> None:
        for matrix, weight in zip(self.matrices, self.weights):
            matrix.grad = None if weight.grad is None else pixels_last(weight.grad).reshape(matrix.shape)
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


def outer_weights(network: nn.Module) -> Iterator[nn.Parameter]:
    """Tables of embeddings, and the first and the last layer of a network."""
    layers = [layer for layer in network.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    for layer in (layers[0], layers[-1]):
        yield layer.weight
    for table in network.modules():
        if isinstance(table, nn.Embedding):
            yield table.weight


def pixels_last(weight: Tensor) -> Tensor:
    return weight.permute(0, 2, 3, 1) if weight.dim() == 4 else weight


def configurations(networks: nn.ModuleDict) -> dict[str, Any]:
    """What each network is built from, as JSON would give it back."""
    plain = {
        name: {key: value for key, value in dict(network.config).items() if not key.startswith("_")}
        if isinstance(network.config, dict)
        else network.config.to_diff_dict()
        for name, network in networks.items()
    }
    return json.loads(json.dumps(plain))


def densities() -> Tensor:
    """How often each time step is trained on: a quarter evenly, the rest by how much an image decides there.

    Half of the linear steps hold hardly anything but noise. Karras et al. 2022 (arXiv:2206.00364, table 1) draw the
    logarithm of sigma, noise over signal, from a normal distribution; theirs has data of deviation 0.5.
    """
    kept = DDIMScheduler(**SCHEDULER).alphas_cumprod.double()
    logarithm = ((1 - kept) / kept).log() / 2
    width = torch.gradient(logarithm)[0]
    normal = width * (-0.5 * ((logarithm - LOG_SIGMA[0]) / LOG_SIGMA[1]).square()).exp()
    return normal / normal.sum() * (1 - EVENLY) + EVENLY / len(kept)


def weights() -> Tensor:
    """What an error of v counts at each time step: less where there is so little noise that no picture shows it.

    An error of v moves the image by sigma times as much: before the 60th step that was 33 dB and more below white, and
    yet 40 % of the loss. From min-SNR (Hang et al. 2023, arXiv:2303.09556, eq. 5).
    """
    kept = DDIMScheduler(**SCHEDULER).alphas_cumprod
    return (HIDDEN * (1 - kept) / kept).clamp(max=1)


class Loss:
    """Weighted squared error of v = signal * noise - sigma * image (Salimans and Ho 2022, arXiv:2202.00512, appendix D).

    A network that predicts the noise must copy its input almost exactly where all is noise, which took more images
    than were to be had; v asks for the noise where the image is known and for the image where the noise is.
    The time steps of a batch are stratified, which lowers the variance for nothing. Where the mean of all images that
    noise leaves open is known, it takes the place of the image: the same gradient in the mean, less of chance in it.
    """

    def __init__(self) -> None:
        self.scheduler = DDIMScheduler(**SCHEDULER)
        self.below, self.weights = densities().cumsum(0).float(), weights()

    def __call__(
        self,
        predict: Callable[[Tensor, Tensor], Tensor],
        clean: Tensor,
        mean: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
    ) -> Tensor:
        """`mean` is of the images in noisy ones of this signal and sigma."""
        noise, size = torch.randn_like(clean), len(clean)
        steps = torch.searchsorted(self.below, (torch.arange(size) + torch.rand(size)) / size)
        steps = steps.clamp(max=len(self.below) - 1).to(clean.device)
        noisy = self.scheduler.add_noise(clean, noise, steps)
        with torch.autocast(clean.device.type, torch.bfloat16, enabled=multiplies_bf16(clean.device)):
            predicted = predict(noisy, steps)
        if mean is not None:
            kept = self.scheduler.alphas_cumprod.to(clean.device)[steps]
            signal, sigma = kept.sqrt(), (1 - kept).sqrt()
            clean = mean(noisy, signal, sigma)
            noise = (noisy - signal.view(-1, 1, 1, 1) * clean) / sigma.view(-1, 1, 1, 1)
        squares = (predicted.float() - self.scheduler.get_velocity(clean, noise, steps)).square()
        return (squares.mean((1, 2, 3)) * self.weights.to(clean.device)[steps]).mean()


def save_checkpoint(file: Path, trainer: Trainer) -> None:
    """One safetensors file with the state as JSON in its header, so that a single rename replaces it all."""
    tensors = {f"raw.{name}": value for name, value in trainer.networks.state_dict().items()}
    tensors |= {f"ema.{name}": value for name, value in trainer.ema.state_dict().items()}
    tensors |= {f"optimizer.{name}": value for name, value in trainer.optimizer.tensors().items()}
    metadata = {
        "state": json.dumps(asdict(trainer.state)),
        "networks": json.dumps(configurations(trainer.networks)),
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".partial")
    save_file({name: value.cpu().contiguous() for name, value in tensors.items()}, temporary, metadata)
    os.replace(temporary, file)


def read_checkpoint(file: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any], State]:
    """The tensors by group (raw, ema, optimizer), the networks' configurations, and the state."""
    groups: dict[str, dict[str, Tensor]] = {group: {} for group in GROUPS}
    try:
        with safe_open(file, framework="pt") as stored:
            metadata = stored.metadata() or {}
            for key in stored.keys():  # noqa: SIM118, the file handle is no dict
                group, name = key.split(".", 1)
                groups[group][name] = stored.get_tensor(key)
        state = json.loads(metadata["state"])
        known = {field.name for field in fields(State)}
        return groups, json.loads(metadata["networks"]), State(**{k: state[k] for k in known & state.keys()})
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise DataError(
            f"{file} is no checkpoint of these trainers ({error}): choose another --run"
        ) from error


class Trainer:
    """The weights, their average, the optimizer and the state, advanced one batch at a time."""

    def __init__(self, networks: dict[str, nn.Module], args: argparse.Namespace) -> None:
        self.args, self.file, self.state = args, args.run / CHECKPOINT, State()
        self.networks = nn.ModuleDict(networks).to(args.device, memory_format=torch.channels_last)
        self.ema = copy.deepcopy(self.networks).requires_grad_(False)
        self.optimizer = Optimizer(self.networks, args.lr)
        if self.file.exists():
            self.restore()
        self.state.target = State.target
        self.weights = [weight for weight in self.networks.parameters() if weight.requires_grad]
        trained = dict(self.networks.named_parameters())
        self.averages = [w for name, w in self.ema.named_parameters() if trained[name].requires_grad]

    def restore(self) -> None:
        groups, stored, self.state = read_checkpoint(self.file)
        if stored != (here := configurations(self.networks)):
            differing = sorted(
                f"{name}.{key}"
                for name in stored.keys() | here.keys()
                for key in stored.get(name, {}).keys() | here.get(name, {}).keys()
                if stored.get(name, {}).get(key) != here.get(name, {}).get(key)
            )
            raise DataError(
                f"{self.file} holds networks of another configuration (they differ in {', '.join(differing[:5])}): "
                "choose another --run, or remove that folder to begin anew"
            )
        self.networks.load_state_dict(groups["raw"])
        self.ema.load_state_dict(groups["ema"])
        self.optimizer.restore(groups["optimizer"])
        if self.state.seen < self.args.images:
            self.state.cooldown_from = None
        console.log(f"going on from {self.state}")

    @property
    def last_image(self) -> int:
        begin = self.state.cooldown_from
        return (max(self.args.images, self.state.seen) if begin is None else begin) + self.args.cooldown

    @property
    def rate(self) -> float:
        """Linear warm-up, a constant, then a linear fall to zero once the cooldown has begun."""
        state, args, left = self.state, self.args, 1.0
        if state.cooldown_from is not None:
            left = max(0.0, 1 - (state.seen - state.cooldown_from) / max(args.cooldown, 1))
        return args.lr * min(1.0, (state.seen + args.batch) / max(args.warmup, 1)) * left

    def step(self, loss: Tensor) -> None:
        """One update."""
        state = self.state
        if state.cooldown_from is None and state.seen >= self.args.images:
            state.cooldown_from = state.seen
        self.networks.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.weights, 1.0)
        self.optimizer.step(self.rate)
        # A young average forgets faster, or it would hold the first weights for long.
        updates = state.seen // self.args.batch
        kept = min(self.args.ema, (1 + updates) / (10 + updates))
        torch._foreach_lerp_(self.averages, [weight.detach() for weight in self.weights], 1 - kept)
        state.seen += self.args.batch
        value = loss.item()
        if value != value:
            raise DataError(f"the loss is not a number after {state.seen} images: go on with a smaller --lr")
        state.loss += (value - state.loss) * (0.01 if state.loss else 1.0)


def run(
    trainer: Trainer, loss_of: Callable[[], Tensor], show: Callable[[nn.ModuleDict, Path], None] | None = None
) -> None:
    """Trains to the last image with progress and time left; saves now and then, and when it is told to stop."""
    args, state, stop = trainer.args, trainer.state, []
    torch.set_num_threads(args.threads)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda received, _: stop.append(received))
    clock = last_saved = last_logged = last_shown = time.monotonic()
    seen_then = began = state.seen
    columns = TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn(elapsed_when_finished=True)
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("training")
        while state.seen < trainer.last_image and not stop:
            trainer.step(loss_of())
            now = time.monotonic()
            state.seconds, clock = state.seconds + now - clock, now
            progress.update(bar, completed=state.seen - began, total=trainer.last_image - began)
            if now - last_logged > 60:
                speed = (state.seen - seen_then) / (now - last_logged)
                left = (trainer.last_image - state.seen) / max(speed, 1e-9) / 60
                console.log(
                    f"{state.seen} images, loss {state.loss:.4f}, lr {trainer.rate:.1e}, {speed:.0f} images/s, "
                    f"{left:.0f} minutes left"
                )
                last_logged, seen_then = now, state.seen
            if now - last_saved > 60 * args.save_minutes:
                save_checkpoint(trainer.file, trainer)
                last_saved = now
            if show and now - last_shown > 60 * args.show_minutes:
                show(trainer.ema, args.run / "samples.png")
                clock = last_shown = time.monotonic()
    save_checkpoint(trainer.file, trainer)
    console.log(f"saved at {state.seen} images, loss {state.loss:.4f}")


def compiled(network: nn.Module, args: argparse.Namespace) -> nn.Module:
    """As --compile asks; on the CPU, strided convolutions of a U-Net got gradients of zero from torch 2.13."""
    if args.compile and args.device == "cpu":
        raise DataError("--compile gives wrong gradients on the CPU: leave it out, or train on --device cuda")
    return torch.compile(network) if args.compile else network  # type: ignore[return-value]


def add_arguments(
    training: argparse.ArgumentParser, *, images: int, cooldown: int, lr: float, ema: float = 0.999
) -> None:
    """The options that every trainer has."""
    training.add_argument("--images", type=int, default=images, help="images before the cooldown")
    training.add_argument("--cooldown", type=int, default=cooldown, help="images over which lr falls to zero")
    training.add_argument("--warmup", type=int, default=10_000, help="images over which lr rises")
    training.add_argument("--batch", type=int, default=64)
    training.add_argument("--lr", type=float, default=lr)
    training.add_argument("--ema", type=float, default=ema)
    training.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    training.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    training.add_argument("--save-minutes", type=float, default=4.0)
    training.add_argument("--show-minutes", type=float, default=15.0, help="minutes between grids of samples")


def main(parser: argparse.ArgumentParser) -> None:
    """Runs the command that was asked for; an error of data or of a checkpoint is one line."""
    arguments = parser.parse_args()
    try:
        arguments.command(arguments)
    except DataError as error:
        sys.exit(f"error: {error}")
