from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from torchmetrics.functional.image.lpips import ScalingLayer, _normalize_tensor, _spatial_average

from stepquant.errors import EvaluationError
from stepquant.evaluate.networks.lpips import load_lpips

ALEX = {0: (64, 3, 11), 3: (192, 64, 5), 6: (384, 192, 3), 8: (256, 384, 3), 10: (256, 256, 3)}
VGG_PLAN = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512)


def random_state(shapes: dict[int, tuple[int, int, int]], widths: list[int]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    state = {}
    for index, (out, inputs, side) in shapes.items():
        weight = torch.randn(out, inputs, side, side, generator=generator) / (inputs * side**2) ** 0.5
        state |= {
            f"features.{index}.weight": weight,
            f"features.{index}.bias": torch.randn(out, generator=generator),
        }
    for index, width in enumerate(widths):
        state[f"lin{index}.model.1.weight"] = torch.rand(1, width, 1, 1, generator=generator)
    return state


def alex_state() -> dict[str, Tensor]:
    return random_state(ALEX, [64, 192, 384, 256, 256])


def vgg_state() -> dict[str, Tensor]:
    shapes, index, inputs = {}, 0, 3
    for width in VGG_PLAN:
        if width:
            shapes[index] = (width, inputs, 3)
            inputs, index = width, index + 2
        else:
            index += 1
    return random_state(shapes, [64, 128, 256, 512, 512])


def alex_features(state: dict[str, Tensor], x: Tensor) -> list[Tensor]:
    def conv(x: Tensor, index: int, **options: int) -> Tensor:
        return F.relu(
            F.conv2d(x, state[f"features.{index}.weight"], state[f"features.{index}.bias"], **options)
        )

    one = conv(x, 0, stride=4, padding=2)
    two = conv(F.max_pool2d(one, 3, 2), 3, padding=2)
    three = conv(F.max_pool2d(two, 3, 2), 6, padding=1)
    four = conv(three, 8, padding=1)
    return [one, two, three, four, conv(four, 10, padding=1)]


def vgg_features(state: dict[str, Tensor], x: Tensor) -> list[Tensor]:
    found, index = [], 0
    for place, width in enumerate(VGG_PLAN):
        if width:
            x = F.relu(
                F.conv2d(x, state[f"features.{index}.weight"], state[f"features.{index}.bias"], padding=1)
            )
            index += 2
            if place + 1 == len(VGG_PLAN) or not VGG_PLAN[place + 1]:
                found.append(x)
        else:
            x, index = F.max_pool2d(x, 2, 2), index + 1
    return found


@pytest.mark.parametrize(("state", "features", "name"), [(alex_state, alex_features, "AlexNet"), (vgg_state, vgg_features, "VGG16")])  # fmt: skip
def test_distance_is_that_of_torchmetrics_pieces(state, features, name: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    weights, file = state(), tmp_path / "lpips.safetensors"
    save_file(weights, file)
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.rand(3, 3, 40, 36, generator=generator) for _ in range(2))
    scaled = [ScalingLayer()(2 * x - 1) for x in (a, b)]
    expected = torch.zeros(3)
    for index, (x, y) in enumerate(zip(*(features(weights, image) for image in scaled))):
        apart = (_normalize_tensor(x) - _normalize_tensor(y)) ** 2
        expected += _spatial_average(F.conv2d(apart, weights[f"lin{index}.model.1.weight"]), keep_dim=False)[
            :, 0
        ]
    found = load_lpips(file)
    assert found.name == name
    ours = found(a, b)
    assert ours is not None
    torch.testing.assert_close(ours.float(), expected, rtol=1e-4, atol=1e-5)
    assert (ours > 0.01).all()


def test_equal_images_have_no_distance_and_small_ones_none_at_all(tmp_path: Path) -> None:
    save_file(alex_state(), tmp_path / "lpips.safetensors")
    lpips = load_lpips(tmp_path / "lpips.safetensors")
    images = torch.rand(2, 3, 32, 32)
    same = lpips(images, images)
    assert same is not None
    assert same.abs().max() < 1e-9
    assert lpips(images[..., :16, :16], images[..., :16, :16]) is None
    assert "32 pixels" in lpips.metric().absent
    assert lpips.metric().extractor == lpips.digest


@pytest.mark.parametrize(("damage", "message"), [("heads", "lin0"), ("other", "neither AlexNet nor VGG16"), ("pickle", "never loaded")])  # fmt: skip
def test_wrong_weights_are_one_clear_error(damage: str, message: str, tmp_path: Path) -> None:
    file, state = tmp_path / "lpips.safetensors", alex_state()
    if damage == "heads":
        save_file({name: value for name, value in state.items() if not name.startswith("lin")}, file)
    elif damage == "other":
        save_file({"features.0.weight": torch.zeros(8, 3, 3, 3)}, file)
    else:
        torch.save(state, file)
    with pytest.raises(EvaluationError, match=message) as error:
        load_lpips(file)
    assert "save_file" in str(error.value)
