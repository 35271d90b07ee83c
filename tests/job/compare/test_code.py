"""Keys of a comparison follow the source that makes its parts: what is imported counts, and nothing else."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from stepquant import methods
from stepquant.job.compare import Cell, code
from stepquant.job.compare.cell import MEASURING, SAMPLING
from stepquant.job.compare.start import find_origin

Cells = Callable[..., list[Cell]]
Keys = Callable[[], dict[str, str]]
REPOSITORY = Path(__file__).parents[3]


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty package in the place of this one, as far as keys go."""
    place = tmp_path / "repository" / "src" / "stepquant"
    place.mkdir(parents=True)
    monkeypatch.setattr(code, "PACKAGE", place)
    code.code_digest.cache_clear()
    yield place
    code.code_digest.cache_clear()


@pytest.fixture
def copied(package: Path) -> Path:
    """A copy of this package, with the sources of its kernels."""
    root = package.parents[1]
    shutil.copytree(REPOSITORY / "src" / "stepquant", package, dirs_exist_ok=True)
    shutil.copytree(REPOSITORY / "csrc", root / "csrc")
    shutil.copy(REPOSITORY / "setup.py", root)
    return package


@pytest.fixture
def keys(cells: Cells, copied: Path) -> Keys:
    """Every key of a plain and of a corrected cell, by name, as the copy's source has them now."""
    plain, corrected = cells("minmax", "minmax+ptqd")
    origin = find_origin([plain, corrected])

    def ask() -> dict[str, str]:
        code.code_digest.cache_clear()
        return {
            "plain": origin.artifact_key(plain),
            "corrected": origin.artifact_key(corrected),
            "float images": origin.images_key(plain, 0),
            "measured": origin.cell_key(plain, "an artifact"),
        }

    return ask


def write(package: Path, files: Mapping[str, str]) -> None:
    for name, text in files.items():
        file = package / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


@pytest.mark.parametrize(
    ("file", "changed"),
    [
        ("src/stepquant/methods/minmax.py", {"plain", "corrected"}),
        ("src/stepquant/methods/ptqd.py", {"corrected"}),
        ("src/stepquant/methods/brecq.py", set()),
        ("src/stepquant/fit/correct.py", {"corrected"}),
        ("src/stepquant/runtime/lower.py", {"corrected", "measured"}),
        ("src/stepquant/runtime/ops/norms.py", {"corrected", "measured"}),
        ("src/stepquant/runtime/cpu/products.py", {"corrected", "measured"}),
        ("src/stepquant/runtime/plain/device.py", {"corrected", "measured"}),
        ("csrc/dot.h", {"corrected", "measured"}),
        ("csrc/amx.cpp", {"corrected", "measured"}),
        ("setup.py", {"corrected", "measured"}),
        ("src/stepquant/models/sampling.py", {"plain", "corrected", "float images", "measured"}),
        ("src/stepquant/evaluate/metrics/frechet.py", {"measured"}),
        ("src/stepquant/report/tables.py", set()),
        ("src/stepquant/cli/make.py", set()),
    ],
)
def test_a_line_changes_the_keys_of_what_imports_it(
    file: str, changed: set[str], copied: Path, keys: Keys
) -> None:
    before, place = keys(), copied.parents[1] / file
    place.write_text(place.read_text() + "\n")
    after = keys()
    assert {name for name in before if after[name] != before[name]} == changed
    halves = [{name: key.partition(".")[0] for name, key in found.items()} for found in (before, after)]
    assert halves[0] == halves[1]  # so that --any-code finds them


def test_without_their_sources_the_built_kernels_count(copied: Path, keys: Keys) -> None:
    shutil.rmtree(copied.parents[1] / "csrc")
    built = copied / "_C.some-machine.so"
    built.write_bytes(b"old")
    before = keys()
    built.write_bytes(b"new")
    after = keys()
    assert {name for name in before if after[name] != before[name]} == {"corrected", "measured"}


def test_imports_are_followed_wherever_they_stand(package: Path) -> None:
    write(
        package,
        {
            "__init__.py": "from stepquant.unused import everything",
            "unused.py": "",
            "first.py": "import torch\nfrom stepquant import second, version\nfrom stepquant.folder import within, Name",
            "second.py": "def f():\n    try:\n        import stepquant.third\n    except ImportError:\n        pass",
            "third.py": "from stepquant.first import something\nmatch 1:\n    case 1:\n        from stepquant.fourth import x",
            "fourth.py": '"""from stepquant.unused import nothing"""',
            "folder/__init__.py": "from stepquant.folder.inner import Name",
            "folder/inner.py": "",
            "folder/within.py": "",
            "folder/beside.py": "",
            "version.py": "",
        },
    )
    found = {
        "first",
        "second",
        "third",
        "fourth",
        "version",
        "folder/__init__",
        "folder/inner",
        "folder/within",
    }
    assert set(code.sources(["first"])) == {f"{name}.py" for name in found}
    # What lies in a folder takes nothing from the names that the folder offers.
    assert set(code.sources(["folder.within"])) == {"folder/within.py"}


def test_a_folder_that_is_a_registry_counts_whole(package: Path) -> None:
    write(
        package,
        {
            "a.py": "from stepquant.kinds import registry",
            "kinds/registry.py": "import pkgutil\nfound = pkgutil.iter_modules([])",
            "kinds/one.py": "import stepquant.b",
            "b.py": "",
        },
    )
    assert set(code.sources(["a"])) == {"a.py", "kinds/registry.py", "kinds/one.py", "b.py"}


@pytest.mark.parametrize(
    "modules",
    [SAMPLING, MEASURING, *(methods.modules(name) for name in (*methods.names(), "minmax+tac"))],
    ids="+".join,
)
def test_keys_start_from_modules_that_there_are(modules: tuple[str, ...]) -> None:
    for name in modules:
        file = code.file_of(name)
        assert file is not None
        assert name in (".".join(file.relative_to(code.PACKAGE).with_suffix("").parts), f"{file.parent.name}")


def test_what_measures_a_cell_is_covered() -> None:
    """The jobs that measure import nothing from below that the key of a cell does not know."""
    covered = code.sources(MEASURING)
    for job in ("compare/measure.py",):
        names = code.imported((code.PACKAGE / "job" / job).read_text())
        files = {code.file_of(name) for name in names if not name.startswith("job.")}
        assert files <= set(covered.values())
