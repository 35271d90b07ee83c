"""At the edges of what a command line may hold: one clear error, an exit code that says whose it is, no damage."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from inspect import Parameter, signature
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
from PIL import Image
from typer.models import OptionInfo

from stepquant.cli import compare, demo, diff, lists, main, make, measure, show, study
from stepquant.errors import StepquantError
from stepquant.job import Recipe
from tests.cli.conftest import QUICK

Fails = Callable[..., str]
LONG = "x" * 300
MODULES = (compare, demo, diff, lists, make, measure, show, study)
HARMLESS: dict[str, list[str]] = {"demo": [], "results": []}  # what keeps a command without need from working


Option = tuple[str, str, list[str], type]


def options() -> Iterator[Option]:
    """(command, option, words that the command needs besides, type) of every option that takes a value."""
    for module in MODULES:
        for command, function in module.COMMANDS.items():
            hints = get_type_hints(function, include_extras=True)
            found = {
                name: (get_args(hint), default_of(function, name))
                for name, hint in hints.items()
                if name != "return"
            }
            needed = {
                n: said(n, info)
                for n, ((_, info, *_), default) in found.items()
                if default is Parameter.empty
            }
            for name, ((kind, info, *_), _) in found.items():
                plain = next((part for part in get_args(kind) if part is not type(None)), kind)
                if isinstance(info, OptionInfo) and plain is not bool:
                    others = [word for other, words in needed.items() if other != name for word in words]
                    yield command, option_of(name, info), others, plain


def default_of(function: Callable[..., None], name: str) -> object:
    return signature(function).parameters[name].default


def option_of(name: str, info: OptionInfo) -> str:
    return (info.param_decls or (f"--{name.replace('_', '-')}",))[0]


def said(name: str, info: object) -> list[str]:
    return [option_of(name, info), "nowhere.json"] if isinstance(info, OptionInfo) else ["nowhere"]


def kinds(*wanted: type) -> list[Option]:
    return [option for option in options() if option[3] in wanted]


def shown(option: object) -> str:
    return " ".join(option[:2]) if isinstance(option, tuple) else ascii(option)[:20]


@pytest.mark.parametrize("option", kinds(float), ids=shown)
@pytest.mark.parametrize("value", ["inf", "nan", "1e999", ""])
def test_numbers_that_are_not_finite(option: Option, value: str, fails: Fails) -> None:
    command, name, others, _ = option
    assert name in fails(command, *others, name, value)


@pytest.mark.parametrize("option", kinds(int), ids=shown)
@pytest.mark.parametrize("value", [2**64, 2**200, "", "1e3", "٣x"])
def test_numbers_that_nobody_can_count_to(option: Option, value: object, fails: Fails) -> None:
    command, name, others, _ = option
    assert name in fails(command, *others, name, value)


@pytest.mark.parametrize("option", kinds(str, Path), ids=shown)
@pytest.mark.parametrize("value", ["", LONG, "/dev/null/x"])
def test_names_that_cannot_be(option: Option, value: str, fails: Fails) -> None:
    command, name, others, _ = option
    fails(command, *(others or HARMLESS.get(command, ["nowhere"])), name, value)


def test_numbers_of_all_commands_are_found() -> None:
    assert {option[0] for option in kinds(float)} == {"quantize", "compare", "benchmark", "allocate"}
    assert len(kinds(int)) > 20


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--device", "meta"), "cannot use device 'meta'"),
        (("--set", "percent=" + "[" * 100_000), "--set has lists in lists"),
        (("--scheme", ""), "the value of --scheme is empty"),
        (("--scheme=",), "the value of --scheme is empty"),
        (("--plan", "latin.json"), "cannot read the plan"),
        (("--plan", "deep.json"), "cannot read the plan"),
        (("--plan", "words.json"), "a plan rule is an object"),
        (("--plan", "number.json"), "'roles' of a plan rule"),
        (("--plan", LONG), "cannot read the plan"),
        (("--prompts", "latin.json"), "cannot read the prompts"),
        (("--out", "\udcff"), "is not UTF-8"),
    ],
)
def test_quantize_refuses(
    tiny: Path,
    tmp_path: Path,
    fails: Fails,
    words: tuple[str, ...],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("latin.json").write_bytes('{"name": "für"}'.encode("latin-1"))
    Path("deep.json").write_text("[" * 100_000)
    Path("words.json").write_text('{"rules": ["float"]}')
    Path("number.json").write_text('{"rules": [{"grid": "float", "roles": 5}]}')
    assert said in fails("quantize", tiny, *QUICK, "--out", "out", *words)
    assert not Path("out").exists()


def test_an_empty_scheme_is_none_in_python_either() -> None:
    with pytest.raises(StepquantError, match="unknown scheme"):
        Recipe.of(scheme="").check()


def test_the_largest_seed_works(tiny: Path, tmp_path: Path) -> None:
    seed = str(2**63 - 1)
    assert main(["quantize", str(tiny), *QUICK, "--seed", seed, "--out", str(tmp_path / "out"), "-q"]) == 0


def test_json_to_the_terminal_stands_behind_what_is_said(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["schemes", "--json", "/dev/stdout"]) == 0
    out = capfd.readouterr().out
    assert "w8a8" in json.loads(out[out.index("{") :])
    assert out.startswith("scheme")
    assert not Path("/dev/stdout").is_file() or Path("/dev/stdout").is_symlink()


def test_a_full_disk_keeps_the_older_picture(
    tiny: Path, tmp_path: Path, fails: Fails, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "grid.png"
    words = ("generate", str(tiny), "--images", "2", "--steps", "2", "--out", str(out))
    assert main([*words, "--quiet"]) == 0
    former = out.read_bytes()

    def full(file: Path, data: bytes) -> None:
        file.open("wb").write(data[:100])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    assert "No space left on device" in fails(*words, "--seed", "5")
    assert out.read_bytes() == former
    assert list(tmp_path.iterdir()) == [out]
    Image.open(out).verify()


@pytest.mark.parametrize("columns", ["0", "1", ""])
def test_narrow_terminals_show_something(
    columns: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    assert main(["methods"]) == 0
    assert "minmax" in capfd.readouterr().out


def start(*words: str, **options: object) -> subprocess.Popen[str]:
    def begin() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # the background of a shell ignores it

    command = [sys.executable, "-m", "stepquant", *words]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=begin
    )


def test_ctrl_c_while_the_command_imports_is_one_line() -> None:
    process = start("methods")
    maps = Path(f"/proc/{process.pid}/maps")
    while "libtorch_python" not in maps.read_text():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130
    assert said.strip() == "Interrupted: nothing had begun"


@pytest.mark.parametrize("words", [("methods",), ("--help",)])
def test_a_closed_pipe_ends_quietly(words: tuple[str, ...]) -> None:
    process = start(*words)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    said = process.stderr.read()
    assert process.wait(120) == 141
    assert "Traceback" not in said
    assert "Broken" not in said
