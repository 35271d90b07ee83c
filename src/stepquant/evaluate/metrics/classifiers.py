"""Image classifiers as metrics: a Frechet distance of their features, and the share of images recognised as their label.

The package carries one for each kind of data that it knows; a user may bring one for classes of their own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from stepquant.core.digest import tensors_digest, value_digest
from stepquant.errors import EvaluationError
from stepquant.evaluate.metrics.number import Number, unavailable
from stepquant.evaluate.metrics.singles import share_number
from stepquant.evaluate.networks.classifier import FeatureNet, load_feature_net
from stepquant.evaluate.networks.reader import Extractor
from stepquant.models import zoo

ASKED = "class asked for"
NOBODY = -1  # in place of 0 or 1, where the prompt or label names no class of this classifier


@dataclass(frozen=True)
class Shipped:
    """What the package ships for one data set: a classifier, the name of its distance, and a file of statistics."""

    classifier: str
    distance: str
    label: str


SHIPPED = {
    "characters": Shipped("stepquant:characters-features", "FD-CH", "characters test"),
    "cifar10": Shipped("stepquant:cifar10-features", "FD-C10", "CIFAR-10 test"),
}
DEFAULT = "characters"


@dataclass(frozen=True)
class Classifier:
    """A network of features and classes, and the name of the distance between its features."""

    distance: str
    net: FeatureNet

    @property
    def digest(self) -> str:
        """Over weights and configuration, which decide its answers."""
        return value_digest([tensors_digest(self.net.state_dict()), self.net.config])[:12]

    def extractor(self) -> Extractor:
        digest = tensors_digest(self.net.state_dict())[:12]
        return Extractor(self.distance, self.net, digest, self.net.size)

    def reads(self, size: tuple[int, int]) -> bool:
        return tuple(size) == (self.net.size, self.net.size)

    def read(self, images: Tensor, asked: Sequence[str]) -> Tensor:
        """1 for each image whose class is the one that was asked for, 0 for others, NOBODY where none is known."""
        wanted = torch.tensor([class_asked(one, self.net.classes) for one in asked])
        if len(wanted) != len(images):
            raise EvaluationError("every image needs its class", got=len(wanted), expected=len(images))
        with torch.no_grad():
            shown = self.net.logits(images.float()).argmax(1)
        return torch.where(wanted == NOBODY, NOBODY, (shown == wanted).long())

    def numbers(self, values: Mapping[str, Tensor]) -> list[Number]:
        hits = {name: found[found != NOBODY] == 1 for name, found in values.items()}
        if not len(hits["quantized"]):
            known = ", ".join(self.net.classes[:3])
            why = f"no prompt begins with a class of the classifier ({known}, ...): give --classifier DIR"
            return [unavailable("recognised", ASKED, why, "higher")]
        note = f"share recognised as what was asked, of {len(self.net.classes)} classes"
        return [share_number("recognised", ASKED, hits, "higher", self.digest, note)]


def class_asked(asked: str, classes: Sequence[str]) -> int:
    """The class that is asked for by its number, or that a prompt begins with; of several the longest name."""
    if asked.isdecimal():
        return int(asked) if int(asked) < len(classes) else NOBODY
    text = " ".join(words(asked))
    found = [name for name in classes if f"{text} ".startswith(f"{' '.join(words(name))} ")]
    return classes.index(max(found, key=len)) if found else NOBODY


def words(text: str) -> list[str]:
    """Letters and digits alone, in small letters: `diamond-blue` is written `Diamond blue,` in prompts."""
    return "".join(letter if letter.isalnum() else " " for letter in text.lower()).split()


def read_classifier(folder: Path) -> Classifier:
    """The classifier in a folder; its distance is named like the shipped one if it is that, else by the folder."""
    known = {zoo.path(one.classifier): one.distance for one in SHIPPED.values()}
    try:
        net = load_feature_net(folder)
    except (OSError, KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        raise EvaluationError(
            f"the classifier cannot be loaded: {str(error).strip().splitlines()[0]}",
            where=str(folder),
            expected="a folder with config.json and model.safetensors",
            fix="train one on data of yours: examples/train_features.py",
        ) from error
    classes = net.config["num_classes"]
    if net.classes and len(net.classes) != classes:
        raise EvaluationError(
            "every class of the classifier needs its name",
            where=str(folder),
            got=len(net.classes),
            expected=classes,
        )
    return Classifier(known.get(Path(folder), f"FD ({Path(folder).resolve().name})"), net)


def shipped_classifier(data: str | None = None) -> Classifier:
    """The shipped classifier of this data set, else the default one."""
    return read_classifier(zoo.path(SHIPPED.get(data or DEFAULT, SHIPPED[DEFAULT]).classifier))
