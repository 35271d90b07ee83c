"""Checkpoint: how far learning is, in a file of its own, so that a killed run goes on to the same bits."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Generator, Tensor

from stepquant.calib.cache import atomically
from stepquant.errors import CalibrationError
from stepquant.fit.learner import Learner, Schedule


class Batches:
    """Batches across shuffled epochs: every record is used equally often, and none is dropped.

    With each one comes what is known of the next. It is not drawn early: others draw from the generator in between.
    """

    def __init__(self, records: Tensor, schedule: Schedule, generator: Generator) -> None:
        self.records, self.size, self.generator = records, schedule.batch, generator
        self.left = records[:0]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            while len(self.left) < self.size:
                order = torch.randperm(len(self.records), generator=self.generator)
                self.left = torch.cat([self.left, self.records[order]])
            rows, self.left = self.left[: self.size], self.left[self.size :]
            yield rows, self.left[: self.size]


class Checkpoint:
    """The best state on held-out records so far, and everything that decides what comes next."""

    def __init__(
        self, learner: Learner, optimizer: torch.optim.Optimizer, batches: Batches, file: Path | None
    ) -> None:
        self.learner, self.optimizer, self.batches, self.file = learner, optimizer, batches, file
        self.best, self.best_state = float("inf"), learner.state()
        self.iteration, self.waited = 0, 0

    def look(self, loss: float) -> None:
        """At the loss on held-out records."""
        self.waited = 0 if loss < self.best else self.waited + 1
        if loss < self.best:
            self.best, self.best_state = loss, self.learner.state()

    def learnt(self) -> list[Tensor]:
        """What the optimizer changes, in its order."""
        return [one for group in self.optimizer.param_groups for one in group["params"]]

    def keep(self) -> None:
        if self.file is None:
            return
        state = self.optimizer.state
        tensors = {f"now.{i}": value for i, value in enumerate(self.learner.state())}
        tensors |= {f"best.{i}": value for i, value in enumerate(self.best_state)}
        tensors |= {
            f"{key}.{i}": value for i, one in enumerate(self.learnt()) for key, value in state[one].items()
        }
        tensors |= {"left": self.batches.left, "chance": self.learner.generator.get_state()}
        note = {"at": json.dumps([self.iteration, self.waited, self.best])}
        own = {name: value.detach().cpu().clone() for name, value in tensors.items()}
        atomically(self.file, lambda temporary: save_file(own, temporary, metadata=note))

    def go_on(self) -> None:
        """Where an earlier run was."""
        if self.file is None or not self.file.exists():
            return
        try:
            with safe_open(self.file, "pt") as stored:
                tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
                self.iteration, self.waited, self.best = json.loads(stored.metadata()["at"])
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise CalibrationError(
                f"the checkpoint of an earlier run is damaged: {error}",
                where=str(self.file),
                fix="delete this file and run again",
            ) from error
        count = len(self.best_state)
        self.learner.restore([tensors[f"now.{i}"] for i in range(count)])
        self.best_state = [tensors[f"best.{i}"].to(like) for i, like in enumerate(self.best_state)]
        for i, one in enumerate(self.learnt()):
            names = [
                name
                for name in tensors
                if name.endswith(f".{i}") and name.split(".")[0] not in ("now", "best")
            ]
            self.optimizer.state[one] = {
                name.rpartition(".")[0]: tensors[name].to(one.device) for name in names
            }
        self.batches.left = tensors["left"]
        self.learner.generator.set_state(tensors["chance"])
