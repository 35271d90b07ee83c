"""What the documentation tells people to type exists."""

from __future__ import annotations

import ast
import json
import re
import shlex
from pathlib import Path

import pytest
import typer

import stepquant
from stepquant.cli.app import app
from stepquant.quant.plan import Plan

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(
        rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )


def command_lines() -> list[tuple[str, str]]:
    found = []
    for page in PAGES:
        lines = [line for block in blocks(page, "") for line in block.splitlines()]
        lines += re.findall(r"`(stepquant [^`]+)`", page.read_text(encoding="utf-8"))
        found += [(page.name, line.partition("  #")[0]) for line in lines if line.startswith("stepquant ")]
    return found


def test_commands_are_documented() -> None:
    named = {shlex.split(line)[1] for _, line in command_lines()}
    assert named >= {"quantize", "generate", "evaluate", "benchmark", "report", "inspect"}


@pytest.mark.parametrize(("page", "line"), command_lines())
def test_documented_commands_and_options_exist(page: str, line: str) -> None:
    _, name, *words = shlex.split(line)
    for alternative in [name] if "|" not in words else [name, *(word for word in words if word != "|")]:
        assert alternative in COMMANDS, page
    known = {
        option
        for parameter in COMMANDS[name].params
        for option in (*parameter.opts, *parameter.secondary_opts)
    }
    options = {word for word in words if word.startswith("--")}
    assert options <= known, page


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_is_code_and_links_lead_somewhere(page: Path) -> None:
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "sq":
                assert node.attr in stepquant.__all__
    for block in blocks(page, "json"):
        assert Plan.from_json(json.loads(block)).rules
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        assert target.startswith("http") or (page.parent / target).exists(), target


def test_the_readme_is_short_and_shows_the_two_commands() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.split()) <= 600
    assert "make demo" in text
    assert "make test" in text


def test_the_plan_of_the_quickstart_works(tiny: Path, tmp_path: Path) -> None:
    from stepquant.job import load
    from stepquant.models.denoiser import Denoiser
    from stepquant.quant.schemes import scheme

    (plan,) = (Plan.from_json(json.loads(block)) for block in blocks(ROOT / "docs" / "quickstart.md", "json"))
    decisions = scheme("w8a8").with_rules(plan.rules).resolve(Denoiser.of(load(tiny)))
    assert decisions["mid_block.resnets.0.conv1", "weight"].grid is None
    assert str(decisions["down_blocks.0.resnets.0.conv1", "weight"].grid) == "int4/channel"
