"""Policies of steps: what they say on the command line and in a configuration, and which t they are about."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from stepquant.core.policy import POLICY, TIMES, FloatSteps, StepPolicy, policy_of
from stepquant.errors import ArtifactError, StepquantError

# As vllm-omni#6560 and diffusers#14664 read it.
SHIPPED: dict[str, Any] = {
    "schema_version": 1,
    "type": "first_last_n",
    "index_space": "denoising_loop_iteration",
    "scope": ["transformer"],
    "default_mode": "native",
    "first_steps": {"count": 3, "mode": "a16"},
    "last_steps": {"count": 2, "mode": "a16"},
    "overlap": "a16",
    "reasoner": "a16",
}


def test_what_others_write_is_read_and_written_alike() -> None:
    policy, scope = StepPolicy.from_json(SHIPPED)
    assert (policy, scope) == (StepPolicy(3, 2), "transformer")
    assert policy.to_json(scope) == {name: value for name, value in SHIPPED.items() if name != "reasoner"}
    native = SHIPPED | {"first_steps": {"count": 3, "mode": "native"}}
    assert StepPolicy.from_json(native)[0] == StepPolicy(0, 2)
    assert StepPolicy.from_json(SHIPPED | {"overlap": "native"})[0] == StepPolicy(3, 2)


def test_what_a_configuration_says_of_steps() -> None:
    said = {"runtime": {"diffusion_step_policy": SHIPPED}}
    assert policy_of(said, "config") == (StepPolicy(3, 2), "transformer")
    none = {name: {"count": 2, "mode": "native"} for name in ("first_steps", "last_steps")}
    for nothing in ({}, {"runtime": None}, {"runtime": {}}, {"runtime": {POLICY: SHIPPED | none}}):
        assert policy_of(nothing, "config") is None
    for odd, words in (({"cache": 1}, "cache"), (3, "config.runtime"), ({POLICY: {}}, "schema_version")):
        with pytest.raises(ArtifactError, match=words):
            policy_of({"runtime": odd}, "config")


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("schema_version", 2),
        ("schema_version", True),
        ("schema_version", "1"),
        ("type", "cosine"),
        ("index_space", "sigma"),
        ("scope", []),
        ("scope", ["transformer", "vae"]),
        ("scope", "transformer"),
        ("default_mode", "a16"),
        ("overlap", "a8"),
        ("reasoner", "a8"),
        ("first_steps", {"count": -1, "mode": "a16"}),
        ("first_steps", {"count": 3, "mode": "a8"}),
        ("last_steps", {"count": 3}),
        ("last_steps", None),
        ("middle_steps", {"count": 3, "mode": "a16"}),
    ],
)
def test_anything_else_is_refused_by_its_name(entry: str, value: Any) -> None:
    with pytest.raises(ArtifactError, match=entry):
        StepPolicy.from_json(SHIPPED | {entry: value})


@pytest.mark.parametrize("entry", [name for name in SHIPPED if name != "reasoner"])
def test_nothing_may_be_missing(entry: str) -> None:
    with pytest.raises(ArtifactError, match=entry):
        StepPolicy.from_json({name: value for name, value in SHIPPED.items() if name != entry})


@pytest.mark.parametrize(
    ("text", "policy"), [("first=3,last=2", (3, 2)), ("last=1", (0, 1)), ("last=1,first=4", (4, 1))]
)
def test_words_of_the_command_line(text: str, policy: tuple[int, int]) -> None:
    assert StepPolicy.parse(text) == StepPolicy(*policy)
    assert StepPolicy.parse(str(StepPolicy(*policy))) == StepPolicy(*policy)


@pytest.mark.parametrize(
    "text", ["", "3", "first=3,", "first=3 last=3", "first=0", "first=-1", "first=1,first=2", "middle=3"]
)
def test_other_words_are_refused(text: str) -> None:
    with pytest.raises(StepquantError, match="which steps"):
        StepPolicy.parse(text)


@pytest.mark.parametrize("counts", [(3, 2), (0, 1), (4, 0), (1, 1)])
@pytest.mark.parametrize(
    "times", [torch.arange(990, -1, -110), torch.linspace(0, 0.9, 10), torch.linspace(3, -3, 10)]
)
def test_the_steps_that_are_counted_are_those_whose_t_is_met(
    counts: tuple[int, int], times: torch.Tensor
) -> None:
    """Whether t falls, as in most samplers, or rises, as in some flows; also behind a trip through JSON."""
    made = FloatSteps.of(StepPolicy(*counts), "unet", times)
    read = FloatSteps.from_json(json.loads(json.dumps(made.to_json())))
    assert read == made
    first, last = counts
    counted = torch.tensor([step < first or step >= len(times) - last for step in range(len(times))])
    assert torch.equal(read(times, len(times)), counted)
    assert [bool(read(t, 1)) for t in times] == counted.tolist()
    assert not read(torch.tensor(read.middle), 1)


def test_other_numbers_of_steps_have_the_same_part_in_float() -> None:
    steps = FloatSteps.of(StepPolicy(2, 2), "unet", torch.arange(990, -1, -110))  # bounds 825 and 165
    few, many = torch.tensor([900, 600, 300, 0]), torch.arange(1000, 0, -25)
    assert steps(few, 4).tolist() == [True, False, False, True]
    assert torch.equal(steps(many, len(many)), (many >= 825) | (many <= 165))


def test_of_many_t_in_a_sample_the_noisiest_decides() -> None:
    steps = FloatSteps.of(StepPolicy(0, 3), "transformer", torch.arange(990, -1, -110))
    frames = torch.tensor([[0, 500, 500], [0, 100, 50]])
    assert steps(frames, 2).tolist() == [False, True]


@pytest.mark.parametrize("times", [[3, 1, 2, 0], [5, 5, 5, 5]])
def test_a_sampler_whose_t_tells_nothing_is_refused(times: list[int]) -> None:
    with pytest.raises(StepquantError, match="back and forth"):
        FloatSteps.of(StepPolicy(1, 1), "unet", torch.tensor(times))


def test_some_step_is_left_to_integers() -> None:
    with pytest.raises(StepquantError, match="no step in integers"):
        FloatSteps.of(StepPolicy(2, 2), "unet", torch.tensor([3, 2, 1, 0]))


@pytest.mark.parametrize(
    "t",
    [
        {"start": 9, "first": None, "last": 2, "end": 0},
        {"start": 9, "first": 2, "last": 7, "end": 0},
        {"start": 9, "first": 7, "last": 2},
        {"start": 9, "first": 7, "last": 2, "end": float("nan")},
        {"start": 9, "first": 7, "last": "2", "end": 0},
    ],
)
def test_t_that_does_not_go_with_the_policy_is_refused(t: dict[str, Any]) -> None:
    with pytest.raises(ArtifactError, match=TIMES):
        FloatSteps.from_json({POLICY: SHIPPED, TIMES: t})
    with pytest.raises(ArtifactError, match=TIMES):
        FloatSteps.from_json({POLICY: SHIPPED})
