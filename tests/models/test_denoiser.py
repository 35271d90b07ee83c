import pytest
import torch
from torch import nn

from stepquant.errors import ModelError
from stepquant.models.denoiser import Denoiser, check_finite
from stepquant.models.families.roles import PARTS
from stepquant.models.split import SplitLayer, split_concats
from tests.models.tiny import CASES


@pytest.mark.parametrize("name", ["plain", "two_layers", "class_scale_shift", "text_to_image"])
def test_splitting_concats_is_exact_and_reversible(name: str) -> None:
    model, arguments, _ = CASES[name]()
    model.eval()
    denoiser = Denoiser(model)
    before, roles = denoiser.predict(arguments), denoiser.sites()
    undo = split_concats(model, denoiser.concats())
    assert torch.allclose(denoiser.predict(arguments), before, atol=2e-5)
    for path in [p for p, m in model.named_modules() if isinstance(m, SplitLayer)]:
        assert denoiser.sites()[f"{path}.0"] == denoiser.sites()[f"{path}.1"] == roles[path]
    undo()
    assert denoiser.sites() == roles
    assert torch.equal(denoiser.predict(arguments), before)


def test_an_undeclared_class_is_named() -> None:
    with pytest.raises(ModelError, match="Linear"):
        Denoiser(nn.Linear(1, 1))


def test_a_leaf_without_role_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _, _ = CASES["plain"]()
    kind = type(model.down_blocks[0].resnets[0])
    monkeypatch.setitem(PARTS, kind, {"conv1": "conv"})
    with pytest.raises(ModelError, match=r"conv2|time_emb_proj"):
        Denoiser(model).sites()


def test_arguments_are_bound_by_name() -> None:
    model, given, _ = CASES["plain"]()
    bound = Denoiser(model).bind((given["sample"], given["timestep"]), {"return_dict": False})
    assert set(bound) == {"sample", "timestep"}


def test_digest_follows_the_weights() -> None:
    model, _, _ = CASES["plain"]()
    before = Denoiser(model).digest()
    assert Denoiser(model).digest() == before
    with torch.no_grad():
        model.conv_in.weight[0, 0, 0, 0] += 1
    assert Denoiser(model).digest() != before


def test_nan_weights_are_named() -> None:
    model, _, _ = CASES["plain"]()
    with torch.no_grad():
        model.conv_out.weight[0] = float("nan")
    with pytest.raises(ModelError, match=r"conv_out\.weight"):
        check_finite(model)
