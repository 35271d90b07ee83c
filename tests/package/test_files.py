"""What a release is made of: one version, one torch, and everything that a wheel and an sdist must hold."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from stepquant.version import TORCH, __version__

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_one_torch_is_pinned_everywhere() -> None:
    pins = [*PROJECT["build-system"]["requires"], *PROJECT["project"]["dependencies"]]
    assert [pin for pin in pins if pin.partition("=")[0] == "torch"] == [f"torch=={TORCH}"] * 2
    assert re.findall(r"torch==[\w.]+", (ROOT / "Makefile").read_text()) == [f"torch=={TORCH}"]
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    named = {
        found for page in pages for found in re.findall(r"torch==([\w.]+)", page.read_text(encoding="utf-8"))
    }
    assert named == {TORCH}


def test_the_changelog_and_the_citation_name_this_version() -> None:
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(r"^## (?!Unreleased)(\S+)", changes, re.MULTILINE)[1] == __version__
    assert re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)[1] == __version__


@pytest.fixture(scope="module")
def laid_out(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, set[str]]:
    """The Python half of a wheel, and the names of an sdist; nothing is compiled or packed."""
    place = tmp_path_factory.mktemp("laid")
    steps = ["egg_info", "--egg-base", str(place), "build_py", "--build-lib", str(place / "wheel")]
    # Without torch there is no extension to describe, which is what takes the time.
    script = (
        "import sys; sys.modules['torch'] = None; sys.argv[0] = 'setup.py'; exec(open('setup.py').read())"
    )
    subprocess.run([sys.executable, "-c", script, "-q", *steps], cwd=ROOT, check=True, capture_output=True)
    return place / "wheel" / "stepquant", set(
        (place / "stepquant.egg-info" / "SOURCES.txt").read_text().split("\n")
    )


def test_a_wheel_holds_every_file_of_the_package_once(laid_out: tuple[Path, set[str]]) -> None:
    package, _ = laid_out
    source = ROOT / "src" / "stepquant"
    want = {
        file.relative_to(source)
        for file in source.rglob("*")
        if file.is_file() and "__pycache__" not in file.parts and file.suffix != ".so"
    }
    assert {file.relative_to(package) for file in package.rglob("*") if file.is_file()} == want
    assert Path("models/zoo/characters/unet/diffusion_pytorch_model.safetensors") in want


def test_an_sdist_holds_what_builds_and_tests_it(laid_out: tuple[Path, set[str]]) -> None:
    _, names = laid_out
    folders = ("csrc", "docs", "examples", "benchmarks", "tests")
    want = {
        str(file.relative_to(ROOT))
        for folder in folders
        for file in (ROOT / folder).rglob("*")
        if file.suffix in (".py", ".md", ".h", ".cpp", ".sh")
    }
    want |= {
        "setup.py",
        "pyproject.toml",
        "Makefile",
        "LICENSE",
        "CHANGELOG.md",
        "CITATION.cff",
        "mkdocs.yml",
        ".clang-format",
    }
    assert not want - names
    assert not [name for name in names if name.endswith((".so", ".pyc"))]
