"""Every method in the folder keeps the promises of all methods."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest

from stepquant import methods


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
