from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from stepquant.errors import EvaluationError
from stepquant.evaluate.networks.inception import InceptionReader, InceptionV3, load_inception, resize

# Every convolution of the ported graph as torchvision's documentation names it: inputs, outputs, kernel height and width.
A = "branch1x1 {i} 64 1 1|branch5x5_1 {i} 48 1 1|branch5x5_2 48 64 5 5|branch3x3dbl_1 {i} 64 1 1|branch3x3dbl_2 64 96 3 3|branch3x3dbl_3 96 96 3 3|branch_pool {i} {p} 1 1"
B = "branch3x3 288 384 3 3|branch3x3dbl_1 288 64 1 1|branch3x3dbl_2 64 96 3 3|branch3x3dbl_3 96 96 3 3"
C = "branch1x1 768 192 1 1|branch7x7_1 768 {c} 1 1|branch7x7_2 {c} {c} 1 7|branch7x7_3 {c} 192 7 1|branch7x7dbl_1 768 {c} 1 1|branch7x7dbl_2 {c} {c} 7 1|branch7x7dbl_3 {c} {c} 1 7|branch7x7dbl_4 {c} {c} 7 1|branch7x7dbl_5 {c} 192 1 7|branch_pool 768 192 1 1"
D = "branch3x3_1 768 192 1 1|branch3x3_2 192 320 3 3|branch7x7x3_1 768 192 1 1|branch7x7x3_2 192 192 1 7|branch7x7x3_3 192 192 7 1|branch7x7x3_4 192 192 3 3"
E = "branch1x1 {i} 320 1 1|branch3x3_1 {i} 384 1 1|branch3x3_2a 384 384 1 3|branch3x3_2b 384 384 3 1|branch3x3dbl_1 {i} 448 1 1|branch3x3dbl_2 448 384 3 3|branch3x3dbl_3a 384 384 1 3|branch3x3dbl_3b 384 384 3 1|branch_pool {i} 192 1 1"
STEM = "Conv2d_1a_3x3 3 32 3 3|Conv2d_2a_3x3 32 32 3 3|Conv2d_2b_3x3 32 64 3 3|Conv2d_3b_1x1 64 80 1 1|Conv2d_4a_3x3 80 192 3 3"
BLOCKS = {
    "Mixed_5b": A.format(i=192, p=32), "Mixed_5c": A.format(i=256, p=64), "Mixed_5d": A.format(i=288, p=64),
    "Mixed_6a": B, "Mixed_6b": C.format(c=128), "Mixed_6c": C.format(c=160), "Mixed_6d": C.format(c=160),
    "Mixed_6e": C.format(c=192), "Mixed_7a": D, "Mixed_7b": E.format(i=1280), "Mixed_7c": E.format(i=2048),
}  # fmt: skip
SIZES = {"Conv2d_1a_3x3": 149, "Conv2d_2a_3x3": 147, "Conv2d_2b_3x3": 147, "Conv2d_3b_1x1": 73, "Conv2d_4a_3x3": 71,
         "Mixed_5b": 35, "Mixed_5d": 35, "Mixed_6a": 17, "Mixed_6e": 17, "Mixed_7a": 8, "Mixed_7c": 8}  # fmt: skip


def table() -> dict[str, tuple[int, ...]]:
    rows = STEM.split("|") + [f"{block}.{row}" for block, text in BLOCKS.items() for row in text.split("|")]
    found: dict[str, tuple[int, ...]] = {"fc.weight": (1008, 2048), "fc.bias": (1008,)}
    for name, *numbers in map(str.split, rows):
        inputs, outputs, high, wide = map(int, numbers)
        found[f"{name}.conv.weight"] = (outputs, inputs, high, wide)
        found |= dict.fromkeys(
            (f"{name}.bn.{part}" for part in ("weight", "bias", "running_mean", "running_var")), (outputs,)
        )
    return found


@pytest.fixture(scope="module")
def net() -> InceptionV3:
    torch.manual_seed(0)
    made = InceptionV3().eval()
    for module in made.modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # away from its beginnings, so that it shows
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return made


@pytest.fixture(scope="module")
def file(net: InceptionV3, tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("weights") / "inception.safetensors"
    save_file(dict(net.state_dict()), where)
    return where


def by_hand(pixels: np.ndarray, side: int) -> np.ndarray:
    """TensorFlow's kernel of old, pixel by pixel."""
    height, width = pixels.shape
    out = np.zeros((side, side))
    for y in range(side):
        for x in range(side):
            top, left = y * height / side, x * width / side
            y0, x0 = math.floor(top), math.floor(left)
            y1, x1 = min(y0 + 1, height - 1), min(x0 + 1, width - 1)
            above = pixels[y0, x0] + (pixels[y0, x1] - pixels[y0, x0]) * (left - x0)
            below = pixels[y1, x0] + (pixels[y1, x1] - pixels[y1, x0]) * (left - x0)
            out[y, x] = above + (below - above) * (top - y0)
    return out


@pytest.mark.parametrize(("height", "width", "side"), [(5, 7, 12), (9, 4, 6), (8, 8, 8), (30, 30, 7)])
def test_resize_is_that_of_tensorflow_1(height: int, width: int, side: int) -> None:
    pixels = np.random.default_rng(0).random((height, width))
    found = resize(torch.from_numpy(pixels)[None, None], side)[0, 0].numpy()
    np.testing.assert_allclose(found, by_hand(pixels, side), atol=1e-12)


def test_resize_is_not_that_of_torch() -> None:
    images = torch.rand(1, 1, 32, 32)
    half_pixel = torch.nn.functional.interpolate(images, (299, 299), mode="bilinear", align_corners=False)
    assert (resize(images, 299) - half_pixel).abs().max() > 0.1


def test_names_and_shapes_are_those_of_the_ported_graph(net: InceptionV3) -> None:
    found = {
        name: tuple(x.shape)
        for name, x in net.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    assert found == table()
    # torchvision's InceptionV3 without its auxiliary head has 23,834,568 parameters and 8 classes less.
    assert sum(x.numel() for x in net.parameters()) == 23_834_568 + 8 * 2049


def test_layers_have_the_sizes_of_the_graph(net: InceptionV3) -> None:
    found: dict[str, int] = {}
    hooks = [
        net.get_submodule(name).register_forward_hook(
            lambda _, __, out, name=name: found.update({name: out.shape[-1]})
        )
        for name in SIZES
    ]
    with torch.no_grad():
        pooled, spatial, logits = net(torch.rand(1, 3, 32, 32))
    for hook in hooks:
        hook.remove()
    assert found == SIZES
    assert [tuple(x.shape) for x in (pooled, spatial, logits)] == [(1, 2048), (1, 17 * 17 * 7), (1, 1008)]
    torch.testing.assert_close(logits, pooled @ net.fc.weight.T)  # without the bias


def test_pooling_leaves_the_border_out_and_the_last_block_takes_the_maximum(net: InceptionV3) -> None:
    ones = torch.ones(1, 192, 5, 5)
    pooled = net.Mixed_5b.pooling(ones)
    torch.testing.assert_close(
        pooled[..., 0, 0], pooled[..., 2, 2]
    )  # a padded average would fall at the corner
    spike = torch.zeros(1, 2048, 5, 5)
    spike[..., 2, 2] = 1
    around = net.Mixed_7c.pooling(spike)
    torch.testing.assert_close(around[..., 1, 1], around[..., 2, 2])
    assert not torch.allclose(around[..., 0, 0], around[..., 2, 2])


def test_spatial_features_are_the_first_channels_of_a_branch(net: InceptionV3) -> None:
    kept: list[Tensor] = []
    hook = net.Mixed_6d.branch1x1.register_forward_hook(lambda _, __, out: kept.append(out.clone()))
    with torch.no_grad():
        _, spatial, _ = net(torch.rand(2, 3, 40, 40))
    hook.remove()
    expected = (
        kept[0][:, :7].permute(0, 2, 3, 1).reshape(2, -1)
    )  # height, width, channel: the order of TensorFlow
    torch.testing.assert_close(spatial, expected)
    assert (kept[0] >= 0).all()


def test_weights_are_read_back_and_named_by_their_content(net: InceptionV3, file: Path) -> None:
    found = load_inception(file)
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        expected = net(images)
    read = found.read(images)
    for rows, view in zip(expected, found.views):
        torch.testing.assert_close(read[view.name], rows)
    assert [view.name for view in found.views] == ["FID", "sFID", "IS"]
    assert len(found.digest) == 12
    assert isinstance(found, InceptionReader)
    assert found.resize == "TF1 bilinear to 299"


@pytest.mark.parametrize("damage", ["pickle", "cut", "missing", "shape", "foreign", "nan", "none"])
def test_wrong_weights_are_one_clear_error(net: InceptionV3, file: Path, tmp_path: Path, damage: str) -> None:
    wrong, state = tmp_path / "wrong.safetensors", dict(net.state_dict())
    messages = {"pickle": "never loaded", "cut": "cannot read", "missing": "'fc.bias' is missing",
                "shape": r"got: \(1000, 2048\)", "foreign": "'head.weight' besides", "nan": "NaN",
                "none": "No such file"}  # fmt: skip
    if damage == "pickle":
        torch.save({"fc.bias": state["fc.bias"]}, wrong)
    elif damage == "cut":
        wrong.write_bytes(file.read_bytes()[:1000])
    elif damage != "none":
        if damage == "missing":
            del state["fc.bias"]
        elif damage == "shape":
            state["fc.weight"] = state["fc.weight"][:1000].contiguous()
        elif damage == "foreign":
            state["head.weight"] = torch.zeros(1)
        else:
            state["fc.bias"] = state["fc.bias"] * torch.nan
        save_file(state, wrong)
    with pytest.raises(EvaluationError, match=messages[damage]) as error:
        load_inception(wrong)
    assert str(wrong) in str(error.value)
    if damage != "nan":
        assert "torch.load" in str(error.value)  # the line that converts
        assert "weights_only=True" in str(error.value)
