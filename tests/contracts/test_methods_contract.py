"""Every method in the folder keeps the promises of all methods."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from stepquant import methods
from stepquant.calib.pick import Pick
from stepquant.calib.record import Source
from stepquant.errors import MethodError
from stepquant.models.denoiser import Denoiser
from stepquant.quant.schemes import scheme


@pytest.mark.parametrize("name", methods.names())
def test_every_field_is_used(name: str) -> None:
    """A field without effect is an error: each one is read in its file, or where it is declared."""
    own = methods.kind(name)
    kinds = [kind for kind in own.__mro__ if kind.__module__.startswith(methods.__name__)]
    trees = [ast.parse(Path(inspect.getfile(kind)).read_text()) for kind in kinds]
    read = {node.attr for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    unused = set(own.model_fields) - {"preset"} - read
    assert not unused, f"{name}: unused fields {unused}"


@pytest.mark.parametrize("name", methods.names())
def test_fields_and_files_are_documented(name: str) -> None:
    kind = methods.kind(name)
    assert kind.__doc__, "the listing shows the first line"
    assert all(field.description for field in kind.model_fields.values())
    source = Path(inspect.getfile(kind)).read_text()
    assert source.count("\n") <= 200
    assert "Differs" in source or name == "minmax", "a published method says where it departs from its paper"


@pytest.mark.parametrize("name", methods.names())
def test_values_are_frozen(name: str) -> None:
    method = methods.make(name, {})
    field = next(iter(type(method).model_fields))
    with pytest.raises(ValueError, match="frozen"):
        setattr(method, field, getattr(method, field))


@pytest.mark.parametrize(
    "name", [n for n in methods.names() if not methods.corrects(n) and methods.kind(n).calibrates]
)
def test_every_method_takes_the_number_of_records(
    name: str, source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--samples`: so many, or as few more as fill its last trajectory; alone and behind a correction."""

    class Asked(Exception):  # noqa: N818
        pass

    asked: list[Pick] = []

    def record(_: Source, picks: Sequence[Pick]) -> None:
        asked.extend(picks)
        raise Asked

    monkeypatch.setattr(Source, "record", record)
    monkeypatch.setattr(Source, "times", lambda self: torch.arange(self.sampling.steps))
    drawn = {"times": "uniform"} if "times" in methods.kind(name).model_fields else {}
    for whole in (name, f"{name}+tac"):
        asked.clear()
        built = methods.build(whole, drawn | methods.records(whole, 33))
        with pytest.raises(Asked):
            built(Denoiser.of(source.pipeline), scheme("w8a8"), source)
        assert 33 <= len(asked) < 33 + source.sampling.steps


def test_records_are_counted_in_one_way_only() -> None:
    for name in ("qdiffusion", "tfmq", "gac"):
        with pytest.raises(MethodError, match="samples and trajectories"):
            methods.build(name, {"samples": 8, "trajectories": 2})
        assert methods.build(name, {"samples": 8, "preset": "paper"})


@pytest.mark.parametrize("name", methods.names())
def test_numbers_beyond_all_measure_are_refused(name: str) -> None:
    numbers = {int: [10**30], float: [float("inf"), float("nan")], int | None: [10**30]}
    fields = methods.kind(name).model_fields.items()
    asked = [(key, value) for key, field in fields for value in numbers.get(field.annotation, [])]  # type: ignore[call-overload]
    assert asked
    for key, value in asked:
        with pytest.raises(MethodError, match=f"'{key}'"):
            methods.make(name, {key: value})
