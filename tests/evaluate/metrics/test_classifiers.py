from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from stepquant.errors import EvaluationError
from stepquant.evaluate.metrics.classifiers import (
    ASKED,
    NOBODY,
    Classifier,
    class_asked,
    read_classifier,
    shipped_classifier,
)
from stepquant.evaluate.metrics.frechet import Statistics, frechet
from stepquant.evaluate.metrics.instruments import Networks, Weights, load_networks
from stepquant.evaluate.metrics.measure import Batch
from stepquant.evaluate.metrics.number import Number
from stepquant.evaluate.metrics.parts import read_parts
from stepquant.evaluate.metrics.quality import judge
from stepquant.evaluate.metrics.singles import wilson
from stepquant.evaluate.networks.classifier import FeatureNet
from stepquant.models import zoo

CLASSES = ("diamond-blue", "frog", "diamond", "star-sparkles")


class Told(FeatureNet):
    """Tells the class that the first pixel spells: 0.0 is the first, 0.1 the second, and so on."""

    def logits(self, images: Tensor) -> Tensor:
        number = (images[:, 0, 0, 0] * 10).round().long()
        return torch.nn.functional.one_hot(number, len(CLASSES)).float()


@pytest.fixture
def told() -> Classifier:
    return Classifier("FD (told)", Told((4, 4, 4), len(CLASSES), classes=CLASSES, features=6).eval())


def showing(classes: list[int], size: int = 32) -> Tensor:
    images = torch.rand(len(classes), 3, size, size, generator=torch.Generator().manual_seed(0))
    images[:, 0, 0, 0] = torch.tensor(classes) / 10
    return images


def numbers(batch: Batch, classifier: Classifier | None, data: str | None = None) -> dict[str, Number]:
    asked = bool(batch.prompts)
    judged = judge(iter([batch]), Networks(classifier=classifier), data, prompted=asked)
    return {f"{x.name} {x.against}": x for x in judged.numbers}


@pytest.mark.parametrize(
    ("asked", "number"),
    [
        ("Diamond blue, square red glasses", 0),
        ("diamond blueish", 2),
        ("diamond", 2),
        ("star-sparkles", 3),
        ("froglike", NOBODY),
        ("a frog", NOBODY),
        ("", NOBODY),
        ("1", 1),
        ("4", NOBODY),
        ("-1", NOBODY),
    ],
)
def test_prompts_and_labels_ask_for_a_class(asked: str, number: int) -> None:
    assert class_asked(asked, CLASSES) == number


def test_share_recognised_of_prompts_and_of_labels(told: Classifier) -> None:
    ours, source, other = showing([0, 1, 1, 0]), showing([0, 1, 2, 3]), showing([1, 1, 1, 0])
    prompts = ["diamond blue, x", "frog", "diamond, y", "who knows"]
    others = ["frog"] * 4
    by_prompt = numbers(Batch(source, ours, other, prompts, others), told)[f"recognised {ASKED}"]
    assert (by_prompt.n, by_prompt.unit, by_prompt.better) == (3, "%", "higher")  # one asks for nothing known
    assert by_prompt.value == pytest.approx(200 / 3)
    assert (by_prompt.reference, by_prompt.floor) == (100, 75)
    assert (by_prompt.low, by_prompt.high) == tuple(100 * x for x in wilson(2, 3))
    batch = Batch(source, ours, other, prompts=["0", "1", "2", "3"], other_prompts=["1"] * 4)
    by_label = numbers(batch, told)[f"recognised {ASKED}"]
    assert (by_label.value, by_label.reference, by_label.floor) == (50, 100, 75)


def test_recognition_is_of_those_who_are_asked_for_something_known(told: Classifier) -> None:
    images = showing([0, 1])
    assert f"recognised {ASKED}" not in numbers(Batch(images, images), told)
    unknown = numbers(Batch(images, images, None, ["a cat", "a dog"]), told)[f"recognised {ASKED}"]
    assert unknown.value is None
    assert "diamond-blue, frog" in unknown.unavailable
    bare = numbers(Batch(images, images, None, ["a cat", "a dog"]), None)[f"recognised {ASKED}"]
    assert bare.unavailable == "give --classifier DIR"
    small = showing([0, 1], size=16)
    assert (
        "reads 32x32"
        in numbers(Batch(small, small, None, ["frog", "frog"]), told)[f"recognised {ASKED}"].unavailable
    )


def test_the_users_classifier_gives_the_distance(told: Classifier) -> None:
    images = showing([0, 1] * 8)
    found = numbers(Batch(images, images * 0.9), told)
    assert found["FD (told) float, same seeds"].value is not None
    assert not any(name.startswith("FD-CH") for name in found)


def test_wilson_is_the_interval_of_the_score_test() -> None:
    for hits, count in ((0, 20), (7, 50), (50, 50)):
        for bound in wilson(hits, count):
            if 0 < bound < 1:  # the bounds solve |p - share| = z sqrt(p (1 - p) / n)
                assert abs(bound - hits / count) == pytest.approx(1.96 * (bound * (1 - bound) / count) ** 0.5)
    assert wilson(0, 20)[0] == 0 < wilson(0, 20)[1]
    assert wilson(50, 50)[1] == 1 > wilson(50, 50)[0]


def save(folder: Path, **changes: object) -> Path:
    folder.mkdir(exist_ok=True)
    torch.manual_seed(0)
    net = FeatureNet((4, 4, 6), 3, 28, 5, False, ("a", "b", "c"))
    save_file(
        {name: value.contiguous() for name, value in net.state_dict().items()}, folder / "model.safetensors"
    )
    (folder / "config.json").write_text(json.dumps(net.config | changes))
    return folder


def test_a_folder_of_the_users_is_read_whole(tmp_path: Path) -> None:
    found = read_classifier(save(tmp_path / "mine"))
    assert (found.distance, found.net.classes, found.net.size) == ("FD (mine)", ("a", "b", "c"), 28)
    assert found.extractor()(torch.zeros(2, 3, 28, 28)).shape == (2, 5)
    renamed = read_classifier(save(tmp_path / "mine", classes=["a", "c", "b"]))
    assert renamed.digest != found.digest  # a comparison that is kept must not mistake one for the other
    assert renamed.extractor().digest == found.extractor().digest
    known = load_networks(Weights(classifier=tmp_path / "mine"), prompted=False)
    assert known.digests() == {"classifier": renamed.digest}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"classes": ["a"]}, "needs its name"),
        ({"num_classes": 4}, "cannot be loaded"),
        ({"depth": 3}, "unexpected keyword"),
    ],
)
def test_a_wrong_folder_is_one_clear_error(tmp_path: Path, changes: dict[str, object], words: str) -> None:
    with pytest.raises(EvaluationError, match=words) as error:
        read_classifier(save(tmp_path / "mine", **changes))
    assert "mine" in str(error.value)
    with pytest.raises(EvaluationError, match="cannot be loaded"):
        read_classifier(tmp_path)


def test_the_data_choose_the_network() -> None:
    assert [shipped_classifier(data).distance for data in (None, "photos", "characters", "cifar10")] == [
        *("FD-CH",) * 3,
        "FD-C10",
    ]
    assert (
        load_networks(Weights(), prompted=False).classifier is None
    )  # its classes are not those of any model
    assert load_networks(Weights(), "cifar10", prompted=False).classifier is not None
    assert read_classifier(zoo.path("stepquant:cifar10-features")).distance == "FD-C10"


def test_the_shipped_classifier_knows_the_characters() -> None:
    parts, net = read_parts(), shipped_classifier("characters").net
    heads = torch.arange(20).repeat(3)
    generator = torch.Generator().manual_seed(0)
    picked = torch.stack([torch.randint(len(k.covers), (60,), generator=generator) for k in parts.kinds], 1)
    picked[:, 3] = heads
    images = parts.compose(picked)
    assert net.classes[int(heads[12])] == "frog"
    for seen in (images, (images + 0.05 * torch.randn(images.shape, generator=generator)).clamp(0, 1)):
        with torch.no_grad():
            assert float((net.logits(seen).argmax(1) == heads).float().mean()) > 0.98


@pytest.mark.parametrize("kind", [0, 1, 2, 3, 4], ids=["background", "body", "accessory", "head", "glasses"])
def test_features_see_every_part(kind: int) -> None:
    parts, see = read_parts(), shipped_classifier("characters").extractor()
    generator = torch.Generator().manual_seed(0)
    counts = [len(k.covers) for k in parts.kinds]
    picked, again = (
        torch.stack([torch.randint(count, (500,), generator=generator) for count in counts], 1) for _ in "12"
    )
    changed = picked.clone()
    changed[:, kind] = 0  # of this kind there is one part left
    first, second, third = (Statistics.of(see(parts.compose(x))) for x in (picked, again, changed))
    assert frechet(second, third) > 1.25 * frechet(second, first)
