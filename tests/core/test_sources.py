"""The digest of what decides a module: it changes with every source that the module reaches, and with no other."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from stepquant.core.sources import PACKAGE, code_digest, sources

MEASURED = ("job.compare.measure",)


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sources as they lie in a checkout."""
    root = tmp_path_factory.mktemp("checkout")
    only_python = shutil.ignore_patterns("*.safetensors", "*.png", "*.npz", "*.so", "__pycache__")
    shutil.copytree(PACKAGE, root / "src" / "stepquant", ignore=only_python)
    (root / "csrc").mkdir()
    (root / "csrc" / "dot.h").write_text("// sums\n")
    return root


def changes(root: Path, file: str, modules: tuple[str, ...]) -> bool:
    """Whether one more line in `file` changes the digest of the modules."""
    package, path = root / "src" / "stepquant", root / file
    code_digest.cache_clear()
    before, text = code_digest(modules, package), path.read_text()
    path.write_text(text + "# changed\n")
    code_digest.cache_clear()
    after = code_digest(modules, package)
    path.write_text(text)
    return before != after


@pytest.mark.parametrize(
    "module, file, decides",
    [
        ("methods.ptqd", "src/stepquant/methods/ptqd.py", True),
        ("methods.ptqd", "src/stepquant/runtime/lower.py", True),  # it corrects what really runs
        ("methods.ptqd", "src/stepquant/runtime/cpu/products.py", True),  # by way of the folder of devices
        ("methods.ptqd", "csrc/dot.h", True),
        ("methods.ptqd", "src/stepquant/core/grid.py", True),
        ("methods.ptqd", "src/stepquant/report/card.py", False),
        ("methods.ptqd", "src/stepquant/cli/make.py", False),
        ("methods.minmax", "src/stepquant/methods/ptqd.py", False),
        ("methods.minmax", "src/stepquant/runtime/lower.py", False),
        ("methods.minmax", "csrc/dot.h", False),
        ("job.compare.measure", "src/stepquant/evaluate/metrics/truth.py", True),
        ("job.compare.measure", "src/stepquant/runtime/plain/device.py", True),
        ("job.compare.measure", "csrc/dot.h", True),
        ("models.sampling", "src/stepquant/models/denoiser.py", True),
        ("models.sampling", "src/stepquant/quant/plan.py", False),
    ],
)
def test_one_changed_line(copy: Path, module: str, file: str, decides: bool) -> None:
    assert changes(copy, file, (module,)) == decides


def test_what_was_loaded_is_among_the_sources() -> None:
    """An independent route: what Python itself loaded to measure, of this package."""
    import sys

    import stepquant.job.compare.measure

    loaded = set()
    waiting = [stepquant.job.compare.measure]
    while waiting:
        module = waiting.pop()
        if module in loaded:
            continue
        loaded.add(module)
        names = {getattr(value, "__module__", None) for value in vars(module).values()}
        waiting += [
            sys.modules[n]
            for n in names
            if isinstance(n, str) and n.startswith("stepquant.") and n in sys.modules
        ]
    files = {Path(str(module.__file__)) for module in loaded}
    assert len(files) > 30
    assert files <= set(sources(MEASURED))
