"""The operations under torch.compile, on lesser processors, and without the extension."""

from __future__ import annotations

import importlib.util
import os
import runpy
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import stepquant
from stepquant.core import affine
from stepquant.core.grid import Grid
from stepquant.runtime import ops
from stepquant.runtime.ops import Code
from stepquant.version import TORCH
from tests.runtime import reference
from tests.runtime.ops.examples import CODE, arguments

# The package without what its __init__ imports, which takes longer than the tests.
BARE = (
    "import sys, types; package = types.ModuleType('stepquant'); sys.modules['stepquant'] = package\n"
    f"package.__path__ = [{str(Path(ops.__file__).parents[2])!r}]\n"
)
needs_extension = pytest.mark.skipif(not ops.compiled(), reason="the extension stepquant._C was not built")


@needs_extension
@pytest.mark.parametrize("name", arguments())
def test_fake_tensors_have_the_true_shapes_and_strides(name: str) -> None:
    operation = getattr(torch.ops.stepquant, name).default
    torch.library.opcheck(operation, arguments()[name], test_utils=("test_schema", "test_faketensor"))


def block(x: Tensor, skip: Tensor) -> Tensor:
    y = ops.group_norm_quantize(x, None, None, 4, 1e-5, CODE, "silu", skip=skip)
    z = ops.upsample_nearest2x(ops.quantize_concat(x, skip, CODE)).float() + 1
    tokens = ops.layer_norm_quantize(x.flatten(2).transpose(1, 2), None, None, 1e-5, CODE).float()
    gated = ops.activation_quantize(tokens, "geglu", CODE)
    heads = tokens.unflatten(-1, (4, 8)).transpose(1, 2)
    mixed = ops.attention(heads, heads, heads, 0.1, CODE, CODE, CODE, Code(1 / 255, 0, 0, 255))
    return y.float().sum() + z.sum() + gated.float().sum() + mixed.sum() + ops.quantize(x, CODE).float().sum()


def test_compiles_into_one_graph() -> None:
    x, skip = torch.randn(2, 32, 4, 6), torch.randn(2, 16, 4, 6)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, skip), block(x, skip))
    torch._dynamo.reset()


@needs_extension
@pytest.mark.parametrize("capability, kernels", [("avx2", "avx2"), ("default", "plain")])
def test_lesser_processors_keep_the_contract(capability: str, kernels: str) -> None:
    """The contract once more in a process that is told to have fewer instructions."""
    chosen = "widths or zero_points or grids or straddles or layer_norm_quantize or activation or length or saturates"
    chosen += " or bytes_of_the_specification or extreme_sums or layouts or masks_of_queries or sides"
    script = BARE + (
        "import pytest; from stepquant.runtime import ops\n"
        f"assert ops.capability() == {kernels!r}, ops.capability()\n"
        "files = ['test_ops.py', 'test_attention.py', 'test_attention_by_row.py', 'test_convolve.py', 'test_rotate.py', "
        "'test_low_rank.py']\n"
        f"sys.exit(pytest.main(['-q', '-x', '--noconftest', '-p', 'no:cacheprovider', '-k', {chosen!r}, *files]))\n"
    )
    environment = os.environ | {
        "ATEN_CPU_CAPABILITY": capability,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    run = subprocess.run(
        [sys.executable, "-c", script],
        env=environment,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]


def test_without_the_extension_everything_still_runs() -> None:
    script = BARE + (
        "sys.modules['stepquant._C'] = None\n"
        "import torch; from stepquant.runtime import ops\n"
        "assert not ops.compiled() and ops.capability() == 'none'\n"
        "assert 'no compiler at install' in ops.why_plain()\n"
        "x = torch.randn(1, 8, 4, 4)\n"
        "print(ops.group_norm_quantize(x, None, None, 2, 1e-5, ops.Code(0.02), 'silu').dtype)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert run.stdout.strip() == "torch.uint8", run.stderr


def test_an_extension_that_does_not_load_says_why(tmp_path: Path) -> None:
    """A file that is no library stands for one that misses symbols: both are an ImportError of the loader."""
    bogus = tmp_path / "_C.so"
    bogus.write_bytes(b"\x7fELF")
    script = BARE + (
        "import importlib.util, torch\n"
        "class Finder:\n"
        "    def find_spec(name, *_):\n"
        f"        return importlib.util.spec_from_file_location(name, {str(bogus)!r}) if name == 'stepquant._C' else None\n"
        "sys.meta_path.insert(0, Finder)\n"
        "from stepquant.runtime import ops\n"
        "assert not ops.compiled()\n"
        "print(ops.why_plain())\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert f"built for another torch than {torch.__version__}" in run.stdout, run.stderr
    assert str(bogus) in run.stdout, "the loader's own reason"
    assert "pip install --no-build-isolation" in run.stdout
    assert "compiler" not in run.stdout


def test_kernels_for_another_torch_are_not_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Loading them could find every symbol, and crash later; what they were built for stands in the file."""
    bogus = tmp_path / "_C.so"
    bogus.write_bytes(b"\0The compiled operations of stepquant, built for torch 2.1.0\0\7")
    assert ops.torch_of(bogus) == "2.1.0"
    found = importlib.util.spec_from_file_location("stepquant._C", bogus)
    monkeypatch.setattr(ops, "find_spec", lambda name: found)
    monkeypatch.setattr(importlib, "import_module", lambda name: pytest.fail("loaded"))
    why = ops._load()
    assert why is not None
    assert f"another torch than {torch.__version__} (they want torch 2.1.0)" in why


@needs_extension
def test_these_kernels_say_what_they_were_built_for() -> None:
    assert ops.torch_of(Path(importlib.import_module("stepquant._C").__file__)) == TORCH


@pytest.mark.parametrize(
    ("installed", "warned"), [("2.14.0+cpu", True), (TORCH, False), (f"{TORCH}+cpu", False)]
)
def test_another_torch_is_said_at_import(
    installed: str, warned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "__version__", installed)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        runpy.run_path(stepquant.__file__)
    mine = [str(one.message) for one in said if "is made for torch" in str(one.message)]
    assert len(mine) == warned
    assert all(f"torch {TORCH}, and this is {installed}" in one for one in mine)


@pytest.mark.parametrize("text", ["int8/tensor", "uint8/tensor", "int4/tensor/asym", "uint4/tensor"])
def test_the_specification_is_the_affine_map_of_the_package(text: str) -> None:
    grid, x = Grid.parse(text), torch.randn(1000) * 2
    zero_point = 0 if grid.symmetric else (grid.qmin + grid.qmax) // 2 + 1
    scale = 4 / (grid.levels - 1)
    want = affine.quantize(x, torch.tensor(scale), torch.tensor(zero_point), grid)
    got = reference.quantize(x, Code.of_grid(grid, scale, zero_point))
    assert torch.equal(got.float() - (128 if grid.signed else 0), want)


def test_the_specification_agrees_with_torch() -> None:
    x, weight, bias = torch.randn(2, 32, 5, 5), torch.randn(32), torch.randn(32)
    torch.testing.assert_close(
        reference.group_norm(x, weight, bias, 4, 1e-5, "silu"), F.silu(F.group_norm(x, 4, weight, bias, 1e-5))
    )
    q, k, v = (torch.randn(1, 2, 20, 16) for _ in range(3))
    fine = Code(0.02, 128, 0, 255)
    mixed = reference.attention(q, k, v, 0.25, fine, fine, fine, Code(1 / 255, 0, 0, 255))
    want = F.scaled_dot_product_attention(q.clamp(-2.56, 2.54), k.clamp(-2.56, 2.54), v.clamp(-2.56, 2.54))
    torch.testing.assert_close(mixed, want, rtol=0, atol=0.06)
