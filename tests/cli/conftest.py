"""A tiny float pipeline and an artifact of it, made once for all tests of the command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from diffusers import DDIMPipeline, DDIMScheduler

from stepquant.cli import main
from tests.conftest import make_unet

QUICK = ("--method", "minmax", "--steps", "4", "--samples", "8", "--set", "batch=4")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float pipeline folder."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    DDIMPipeline(make_unet(), DDIMScheduler()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def artifact(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that `stepquant quantize` makes of it."""
    out = tmp_path_factory.mktemp("artifacts") / "tiny-w8a8"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STEPQUANT_CACHE", str(tmp_path_factory.mktemp("cache")))
        assert main(["quantize", str(tiny), *QUICK, "--out", str(out), "--quiet"]) == 0
    return out


@pytest.fixture
def fails(capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command line that must end with an error of the user's, and return what it said."""

    def run(*words: object, code: int = 2) -> str:
        found = main([str(word) for word in words])
        said = capfd.readouterr().err
        assert found == code, said
        assert "Traceback" not in said
        return said

    return run
