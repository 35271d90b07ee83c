"""What is said of a model that nobody declared, beside what is declared of the same model."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from stepquant.errors import ModelError
from stepquant.models.denoiser import Denoiser, Seen
from stepquant.models.families import registry
from stepquant.models.families.generic import generic
from stepquant.models.observe import IDLE, changed, later, observed
from stepquant.quant import schemes
from tests.models.tiny import CASES

# What follows from a call, of what may be declared, and what no call can tell apart; plans treat those alike.
FOLLOWS = {"stem": "stem", "head": "head", "context": "context"} | dict.fromkeys(schemes.TIMES, "time")


@pytest.mark.parametrize("name", ["plain", "text_to_image", "class_transformer"])
def test_a_call_shows_what_is_declared(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, arguments, _ = CASES[name]()
    declared = Denoiser(model.eval())
    roles, blocks, products = declared.sites(), declared.blocks(), declared.products()
    monkeypatch.setattr(registry, "declared", dict)
    found = observed(Denoiser(model), arguments)
    assert found.family.generic
    assert (found.family.x, found.family.t) == (declared.family.x, declared.family.t)
    assert set(found.family.text) >= set(declared.family.text)
    assert found.products() == products
    sites = found.sites()
    assert list(sites) == list(roles)
    wrong = {p: (sites[p], r) for p, r in roles.items() if FOLLOWS.get(sites[p]) != FOLLOWS.get(r)}
    assert not wrong
    if name == "class_transformer":
        assert found.blocks() == blocks


def test_what_was_seen_survives_being_written() -> None:
    seen = Seen({"a": "stem"}, ("blocks.0",), {"blocks.0.attn": "why"})
    assert Seen.from_json(seen.to_json()) == seen


def test_a_layer_that_is_never_called_stays_float(monkeypatch: pytest.MonkeyPatch) -> None:
    model, arguments, _ = CASES["plain"]()
    model.spare = nn.Linear(4, 4)
    monkeypatch.setattr(registry, "declared", dict)
    assert "spare" not in Denoiser(model).stays_float()
    assert observed(Denoiser(model), arguments).stays_float() == {"spare": IDLE}


def test_arguments_by_the_words_of_diffusers() -> None:
    class Video(nn.Module):
        def forward(self, latents, prompt_embeds, sigma, img_ids, fps, return_dict=True):  # type: ignore[no-untyped-def]
            return latents

    family = generic(Video())
    assert family is not None
    assert (family.x, family.t, family.text, family.shared) == (
        "latents",
        "sigma",
        ("prompt_embeds",),
        ("img_ids", "fps"),
    )
    with pytest.raises(ModelError, match="without a noisy input"):
        registry.family_of(nn.Linear(1, 1))


def test_changed_arguments_stay_legal() -> None:
    labels, mask = torch.tensor([3, 0]), torch.tensor([True, False])
    given = {"x": torch.zeros(2, 3), "labels": labels, "mask": mask, "none": None}
    other = changed(given)
    assert other["x"].ne(0).all()
    assert other["labels"].tolist() == [0, 3]
    assert torch.equal(other["mask"], mask)
    assert other["none"] is None
    assert later(torch.tensor([0, 8])).tolist() == [1, 6]
    assert later(torch.tensor(0.5)).item() == 0.375
