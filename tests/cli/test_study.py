from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from stepquant.cli import main
from stepquant.quant.plan import Plan

FAST = ("--samples", "2", "--steps", "2", "--bits", "3,8", "--quiet")


@pytest.fixture(scope="session")
def study(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("study") / "sensitivity.json"
    assert main(["sensitivity", str(tiny), "--ports", "weight", *FAST, "--out", str(out)]) == 0
    return out


def test_a_study_becomes_a_plan_that_quantize_takes(
    study: Path, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = json.loads(study.read_text())["rows"]
    assert {row["port"] for row in rows} == {"weight"}
    plan, folder = tmp_path / "plan.json", tmp_path / "out"
    assert main(["allocate", str(study), "--budget-bytes", "100000", "--out", str(plan)]) == 0
    said = capsys.readouterr().out
    assert "8 everywhere" in said
    assert "sites by bits" in said
    assert {str(rule.grid) for rule in Plan.read(plan).rules} >= {"int3/channel", "int8/channel"}
    quick = ("--method", "minmax", "--steps", "2", "--samples", "2")
    assert main(["quantize", str(tiny), "--plan", str(plan), *quick, "--out", str(folder), "--quiet"]) == 0
    packed = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    stored = sum(
        x.nbytes for name, x in packed.items() if x.dtype == torch.uint8 or name.endswith("weight_scale")
    )
    assert 72_000 < stored <= 100_000


def test_layers_are_timed_for_a_budget_of_milliseconds(
    study: Path, tiny: Path, artifact: Path, tmp_path: Path, fails: Callable[..., str]
) -> None:
    times, plan = tmp_path / "times.json", tmp_path / "plan.json"
    assert (
        main(
            ["layers", str(artifact), "--against", str(tiny), "--batch", "1", "--out", str(times), "--quiet"]
        )
        == 0
    )
    ample = ("--budget-ms", "1e9", "--times", str(times))
    assert main(["allocate", str(study), *ample, "--out", str(plan), "--quiet"]) == 0
    assert {rule.grid for rule in Plan.read(plan).rules if rule.path != "*"} == {None}  # float loses nothing
    assert "at least" in fails("allocate", study, "--budget-ms", "0", "--times", times, "--out", plan)


def test_bad_requests_are_one_clear_error(
    study: Path, tiny: Path, artifact: Path, tmp_path: Path, fails: Callable[..., str]
) -> None:
    out, plan = tmp_path / "x.json", tmp_path / "plan.json"
    assert "at least" in fails("allocate", study, "--budget-bytes", 10, "--out", plan)
    assert "one budget" in fails("allocate", study, "--out", plan)
    assert "one budget" in fails("allocate", study, "--budget-bytes", 1, "--budget-bops", 1, "--out", plan)
    assert "stepquant layers" in fails("allocate", study, "--budget-ms", 1, "--out", plan)
    assert "did you mean" in fails(
        "allocate", study, "--budget-bytes", 1e9, "--metric", "noisy", "--out", plan
    )
    assert "cannot read" in fails("allocate", tmp_path / "none.json", "--budget-bytes", 1, "--out", plan)
    out.write_text("{}")
    assert "no sensitivity study" in fails("allocate", out, "--budget-bytes", 1, "--out", plan)
    assert "2 to 8 bits" in fails("sensitivity", tiny, "--bits", "4,16", "--out", out)
    assert "did you mean" in fails("sensitivity", tiny, "--metric", "nois", "--out", out)
    assert "did you mean" in fails("sensitivity", tiny, "--ports", "weights", "--out", out)
    assert "quantized already" in fails("sensitivity", artifact, *FAST, "--out", out)
    assert not plan.exists()


def test_weights_that_measure_are_checked_before_anything_slow(
    artifact: Path, tiny: Path, tmp_path: Path, fails: Callable[..., str]
) -> None:
    wrong = tmp_path / "weights.pth"
    wrong.write_bytes(b"PK\x03\x04 a zip archive, as torch.save writes it")
    common = ("evaluate", artifact, "--against", tiny, "--images", 2, "--steps", 1)
    for option in ("--inception", "--lpips"):
        said = fails(*common, option, wrong)
        assert "never loaded" in said
        assert "save_file" in said
    assert "there are none" in fails(*common, "--clip", tmp_path)
    assert "--inception PATH" in fails(*common, "--data", tmp_path)
