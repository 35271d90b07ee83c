"""What the documentation tells people to type exists."""

from __future__ import annotations

import ast
import importlib
import json
import re
import shlex
from functools import cache
from pathlib import Path

import pytest
import typer
import yaml

import stepquant
from stepquant.cli.app import app
from stepquant.quant.plan import Plan
from tests.torture.methods import files as declared_in

ROOT = Path(__file__).parents[2]
BESIDE = (
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "SECURITY.md",
    "examples/README.md",
    "csrc/README.md",
)
PAGES = [*(ROOT / name for name in BESIDE), *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(
        rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )


def command_lines() -> list[tuple[str, str]]:
    found = []
    for page in PAGES:
        lines = [line for block in blocks(page, "") for line in block.splitlines()]
        lines += re.findall(r"`(stepquant [a-z][^`]*)`", page.read_text(encoding="utf-8"))
        found += [(page.name, line.partition("  #")[0]) for line in lines if line.startswith("stepquant ")]
    return found


def test_commands_are_documented() -> None:
    named = {shlex.split(line)[1] for _, line in command_lines()}
    assert named >= {"quantize", "generate", "evaluate", "benchmark", "report", "inspect"}


@pytest.mark.parametrize(("page", "row"), [("networks.md", "- `{}`: "), ("architecture.md", "| `{}` | ")])
def test_every_declared_class_is_documented(page: str, row: str) -> None:
    declared: dict[str, set[str]] = {}
    for kind, file in declared_in().items():
        declared.setdefault(file, set()).add(kind)
    lines = (ROOT / "docs" / page).read_text(encoding="utf-8").splitlines()
    for file, kinds in declared.items():
        (line,) = (line for line in lines if line.startswith(row.format(file)) and "Model" in line)
        assert set(re.findall(r"\w+Model\b|\w+UNet\b", line)) == kinds


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


@cache
def anchors(page: Path) -> set[str]:
    """What headings of a page are called in links."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def dead_links(page: Path) -> list[str]:
    found = re.findall(r"\]\(([^)#]*)#?([^)]*)\)", page.read_text(encoding="utf-8"))
    dead = []
    for target, anchor in found:
        place = page.parent / target if target else page
        if not target.startswith("http") and (
            not place.exists() or (anchor and anchor not in anchors(place))
        ):
            dead.append(f"{target}#{anchor}")
    return dead


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_code_is_code_and_links_lead_somewhere(page: Path) -> None:
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "sq":
                assert node.attr in stepquant.__all__
    for block in blocks(page, "json"):
        assert Plan.from_json(json.loads(block)).rules
    for target in dead_links(page):
        pytest.fail(f"{page.name}: nothing is at {target}")


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


def test_dead_links_are_noticed(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# A heading\n[a](#a-heading) [b](page.md#a-heading) [c](#b) [d](other.md) [e](page.md)", "utf-8"
    )
    assert dead_links(page) == ["#b", "other.md#"]


SITE = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))


def test_every_page_is_in_the_site_once() -> None:
    """`make docs` builds it; here its list of pages is read, without the tool."""
    listed = [page for part in SITE["nav"] for entry in part.values()
              for page in ([entry] if isinstance(entry, str) else [next(iter(one.values())) for one in entry])]  # fmt: skip
    inside = {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")}
    assert len(listed) == len(set(listed))
    assert inside <= set(listed)
    assert {name for name in listed if name not in inside} >= set(BESIDE)
    for name in listed:
        assert (ROOT / "docs" / name).is_file() or (ROOT / name).is_file(), name


def test_the_reference_names_all_that_is_public_and_nothing_else() -> None:
    names = re.findall(r"^::: (\S+)$", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert {f"stepquant.{name}" for name in stepquant.__all__} <= set(names)
    for name in names:
        module, _, attribute = name.rpartition(".")
        value = getattr(importlib.import_module(module), attribute)
        assert value.__doc__, f"{name} says nothing about itself"
