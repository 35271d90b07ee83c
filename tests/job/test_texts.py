"""What a text pipeline is asked where nobody says."""

from __future__ import annotations

from stepquant import hub
from stepquant.job.pipelines import prompts_of
from stepquant.models import zoo

TEXT = "stepquant:characters-text"


def config(**recipe: object) -> hub.StepquantConfig:
    return hub.StepquantConfig(recipe=recipe)


def test_an_artifact_of_an_embedded_text_model_is_asked_what_the_model_brings() -> None:
    assert len(zoo.prompts(TEXT)) == 256
    assert prompts_of(config(model=TEXT)) == zoo.prompts(TEXT)
    assert prompts_of(config(model=TEXT, prompts=["frog"])) == ("frog",)
    assert prompts_of(config(model="my-model")) == ()
