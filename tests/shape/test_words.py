"""The glossary, kept: identifiers of src and csrc use a word for the one thing that `docs/glossary.md` says it is."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from tests.shape.source import PACKAGE, files, shown, tree

ROOT = PACKAGE.parents[1]
GLOSSARY = ROOT / "docs" / "glossary.md"


@dataclass(frozen=True)
class Use:
    """An identifier in a file, `fit/blocks` or `csrc/dot`."""

    name: str
    file: str

    def words(self) -> set[str]:
        """`heldLoss`, `HeldLoss` and `held_losses` are all about `held`."""
        parts = re.findall(r"[a-z]+|[A-Z]+(?![a-z])|[A-Z][a-z]*", self.name)
        return {form for part in map(str.lower, parts) for form in (part, part.removesuffix("s"))}

    def lies_in(self, places: tuple[str, ...]) -> bool:
        return any(f"{self.file}/".startswith(f"{place}/") for place in places)


@dataclass(frozen=True)
class Keep:
    """Where a word may stand: `only` there, or everywhere but in `never`."""

    word: str
    only: tuple[str, ...]
    never: tuple[str, ...]
    say: str

    def allows(self, use: Use) -> bool:
        return use.lies_in(self.only) if self.only else not use.lies_in(self.never)


def rows(heading: str) -> list[list[str]]:
    """Cells of the table whose first header is `heading`."""
    lines = GLOSSARY.read_text(encoding="utf-8").splitlines()
    tables = [i for i, line in enumerate(lines) if line.startswith(f"| {heading} |")]
    found = []
    for start in tables:
        for line in lines[start + 2 :]:
            if not line.startswith("|"):
                break
            found.append([cell.strip() for cell in line.strip("|").split("|")])
    return found


def places(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


MEANINGS = {row[0]: row[1] for row in rows("word") if len(row) == 2}
KEPT = [Keep(row[0], places(row[1]), places(row[2]), row[3]) for row in rows("word") if len(row) == 4]
STAY = [(name, places(where)) for name, where, _ in rows("name")]


def identifiers(file: Path) -> Iterator[str]:
    """Names that a Python file defines or uses."""
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.arg | ast.keyword) and node.arg:
            yield node.arg
        elif isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
            yield node.name


def identifiers_of_cpp(text: str) -> set[str]:
    code = re.sub(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"', " ", text, flags=re.DOTALL)
    return set(re.findall(r"[A-Za-z_]\w*", code))


@cache
def uses() -> set[Use]:
    found = {Use(name, shown(file).removesuffix(".py")) for file in files() for name in identifiers(file)}
    for file in sorted((ROOT / "csrc").iterdir()):
        if file.suffix in (".h", ".cpp"):
            found |= {Use(name, f"csrc/{file.stem}") for name in identifiers_of_cpp(file.read_text())}
    return found


def violations(word: Keep, found: set[Use]) -> list[Use]:
    stays = [(name, where) for name, where in STAY if word.word in Use(name, "").words()]
    return sorted(
        (
            use
            for use in found
            if word.word in use.words()
            and not word.allows(use)
            and not any(use.name == name and use.lies_in(where) for name, where in stays)
        ),
        key=lambda use: (use.file, use.name),
    )


@pytest.mark.parametrize("word", KEPT, ids=lambda word: word.word)
def test_a_word_stands_where_it_means_what_the_glossary_says(word: Keep) -> None:
    wrong = [f"{use.file}: {use.name}" for use in violations(word, uses())]
    assert not wrong, f"'{word.word}' has one meaning (docs/glossary.md); {word.say}:\n" + "\n".join(wrong)


def test_the_glossary_is_in_order_and_says_one_sentence_a_word() -> None:
    assert list(MEANINGS) == sorted(MEANINGS, key=str.lower)
    assert len(MEANINGS) > 20
    for word, meaning in MEANINGS.items():
        assert (meaning.endswith("."), ". " in meaning) == (True, False), word
    assert {word.word for word in KEPT} <= {*MEANINGS, "faster", "whole"}


def test_every_word_of_the_glossary_is_in_use() -> None:
    pages = [
        *(ROOT / "docs").glob("*.md"),
        ROOT / "csrc" / "README.md",
        *(ROOT / "csrc").glob("*.h"),
        *files(),
    ]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages if page != GLOSSARY).lower()
    unused = [word for word in MEANINGS if not re.search(rf"\b{re.escape(word.lower())}", text)]
    assert not unused, f"nobody says {unused}"


@pytest.mark.parametrize(
    ("word", "use", "fine"),
    [
        ("held", Use("held_loss", "fit/learner"), True),
        ("held", Use("held", "job/store"), False),
        ("shift", Use("shifts", "core/pack"), False),
        ("shift", Use("colour_shift", "evaluate/metrics/pairs"), True),
        ("shift", Use("colour_shift", "report/page"), False),
        ("step", Use("steps", "core/grid"), False),
        ("step", Use("step", "core/steps"), True),
        ("unit", Use("ResidualUnit", "evaluate/study/sites"), False),
        ("whole", Use("whole_numbers", "csrc/dot"), False),
    ],
)
def test_the_test_would_notice(word: str, use: Use, fine: bool) -> None:
    keep = next(keep for keep in KEPT if keep.word == word)
    assert (not violations(keep, {use})) == fine


def test_identifiers_are_found_in_both_languages() -> None:
    assert {Use("levels", "core/grid"), Use("GroupNormTask", "csrc/kernels")} <= uses()
    assert identifiers_of_cpp('int a = 1;  // held\n"shift" /* whole */ step') == {"int", "a", "step"}
