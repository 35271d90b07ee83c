"""Plan: ordered rules that decide, for every site, a grid or to keep it float, and why."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from stepquant.core.grid import AS_THEY_COME, SIGNED_CODEBOOKS, Grid, GridError
from stepquant.core.policy import FloatSteps
from stepquant.errors import PlanError, UnknownNameError
from stepquant.models.denoiser import Denoiser
from stepquant.models.families.roles import embeddings_in
from stepquant.quant.quantizer import Port

PORTS: dict[str, tuple[Port, ...]] = {
    "layer": ("weight", "input"),
    "product": ("query", "key", "value", "probabilities"),
}
# Others: tensor.
CARRIED = {
    "weight": ("tensor", "channel", "group"),
    "input": ("tensor", "token"),
    "query": ("tensor", "token"),
    "key": ("tensor", "token"),
    "value": ("tensor", "token"),
    "probabilities": ("tensor", "token", "log"),
}


@dataclass(frozen=True)
class Rule:
    """Sites whose path, role and port match get `grid`; None keeps them float."""

    grid: Grid | None
    reason: str
    roles: tuple[str, ...] = ("*",)
    ports: tuple[str, ...] = ("*",)
    path: str = "*"
    optional: bool = False  # may match nothing, because not every model has such a role
    ends: bool = False  # in the first and the last block of the network alone

    def matches(self, path: str, role: str, port: str, ends: Sequence[str] = ()) -> bool:
        return (
            fnmatchcase(path, self.path)
            and (not self.ends or any(path.startswith(f"{block}.") for block in ends))
            and any(fnmatchcase(role, pattern) for pattern in self.roles)
            and any(fnmatchcase(port, pattern) for pattern in self.ports)
        )

    def to_json(self) -> dict[str, Any]:
        shown: dict[str, Any] = {
            "path": self.path,
            "roles": list(self.roles),
            "ports": list(self.ports),
            "reason": self.reason,
        }
        shown |= {"grid": str(self.grid) if self.grid else "float", "optional": self.optional}
        return shown | ({"ends": True} if self.ends else {})

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Rule:
        if not isinstance(data, Mapping):
            raise PlanError("a plan rule is an object", got=data, expected='{"grid": "int8/channel", ...}')
        unknown = sorted(set(data) - {"path", "roles", "ports", "reason", "grid", "optional", "ends"})
        if unknown:
            raise UnknownNameError("key in a plan rule", unknown[0], cls.__dataclass_fields__)
        if "grid" not in data:
            raise PlanError(
                "a plan rule needs a 'grid'", got=dict(data), expected='"float" or a grid as int8/channel'
            )
        return cls(
            grid=read_grid(data["grid"]),
            reason=str(data.get("reason", "the plan file says so")),
            roles=read_patterns(data, "roles"),
            ports=read_patterns(data, "ports"),
            path=str(data.get("path", "*")),
            optional=bool(data.get("optional", False)),
            ends=bool(data.get("ends", False)),
        )


@dataclass(frozen=True)
class Decision:
    """What one site gets, and the rule that said so."""

    path: str
    role: str
    port: Port
    grid: Grid | None
    rule: int
    reason: str


@dataclass(frozen=True)
class Plan:
    name: str
    rules: tuple[Rule, ...] = field(default_factory=tuple)
    float_steps: FloatSteps | None = None  # of a sampler, so that no file of a plan holds them

    @property
    def weight_bits(self) -> int | None:
        """Of its narrowest weights."""
        grids = [rule.grid for rule in self.rules if {"*", "weight"} & set(rule.ports)]
        return min((grid.bits for grid in grids if grid is not None), default=None)

    def resolve(self, denoiser: Denoiser) -> dict[tuple[str, Port], Decision]:
        """The decision for every site of the model: first match wins; what has no integer form stays float."""
        found: dict[tuple[str, Port], Decision] = {}
        used: set[int] = set()
        float_anyway, ends = denoiser.stays_float(), denoiser.ends()
        for path, role, port in all_sites(denoiser):
            fits = (i for i, rule in enumerate(self.rules) if rule.matches(path, role, port, ends))
            index = next(fits, None)
            if index is None:
                raise PlanError(
                    f"no rule of plan '{self.name}' decides '{path}:{port}'",
                    got=f"role {role}",
                    fix="end the plan with a rule for everything else",
                )
            rule = self.rules[index]
            used.add(index)
            if path in float_anyway:
                found[path, port] = Decision(path, role, port, None, index, float_anyway[path])
                continue
            check_carries(denoiser, path, port, rule.grid)
            found[path, port] = Decision(path, role, port, rule.grid, index, rule.reason)
        for index, rule in enumerate(self.rules):
            if index not in used and not rule.optional:
                raise PlanError(
                    f"rule {index} of plan '{self.name}' has no effect",
                    got=json.dumps(rule.to_json()),
                    fix="its pattern matches no site, or earlier rules take them all; see --explain",
                )
        for path in denoiser.products():
            check_together(path, [found[path, port].grid for port in PORTS["product"]])
        return found

    def measures(self) -> bool:
        """Whether some rule gives activations a range that records have to show, whatever the model."""
        grids = [rule.grid for rule in self.rules if set(rule.ports) != {"weight"}]
        return any(grid is not None and grid.granularity not in AS_THEY_COME for grid in grids)

    def quantizes_activations(self) -> bool:
        """Whether some rule gives activations a grid, whatever the model."""
        return any(rule.grid is not None and set(rule.ports) != {"weight"} for rule in self.rules)

    def has_ranges(self, denoiser: Denoiser) -> bool:
        """Whether some activation gets a range that records have to show."""
        found = (decision for decision in self.resolve(denoiser).values() if decision.port != "weight")
        return any(one.grid is not None and one.grid.granularity not in AS_THEY_COME for one in found)

    def with_rules(self, rules: Sequence[Rule], name: str | None = None) -> Plan:
        """This plan with rules that come before its own."""
        return replace(self, name=name or self.name, rules=(*rules, *self.rules))

    def with_grids(self, grids: Mapping[tuple[str, str], Grid], reason: str) -> Plan:
        """This plan with other grids at some sites; its own rules may find nothing left to decide."""
        own = [Rule(grid, reason, ("*",), (port,), path) for (path, port), grid in grids.items()]
        return replace(self, rules=(*own, *(replace(rule, optional=True) for rule in self.rules)))

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "rules": [rule.to_json() for rule in self.rules]}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Plan:
        if not isinstance(data, Mapping) or not isinstance(data.get("rules"), list):
            raise PlanError("a plan file holds {'name': ..., 'rules': [...]}", got=type(data).__name__)
        return cls(str(data.get("name", "custom")), tuple(Rule.from_json(rule) for rule in data["rules"]))

    @classmethod
    def read(cls, file: Path) -> Plan:
        try:
            return cls.from_json(json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError, RecursionError) as error:
            raise PlanError(
                f"cannot read the plan: {error}", where=str(file), expected="a JSON file"
            ) from error


def all_sites(denoiser: Denoiser) -> list[tuple[str, str, Port]]:
    layers = [(path, role, port) for path, role in denoiser.sites().items() for port in PORTS["layer"]]
    layers += [(path, role, "weight") for path, role in embeddings_in(denoiser.model).items()]
    return layers + [(path, "product", port) for path in denoiser.products() for port in PORTS["product"]]


def read_grid(text: str) -> Grid | None:
    try:
        return None if text == "float" else Grid.parse(str(text))
    except GridError as error:
        raise PlanError(
            f"a plan rule has no usable grid: {error.what}",
            got=text,
            expected=f'"float", or {error.expected}',
        ) from error


def read_patterns(data: Mapping[str, Any], key: str) -> tuple[str, ...]:
    found = data.get(key, ["*"])
    if not isinstance(found, list | tuple) or not all(isinstance(pattern, str) for pattern in found):
        raise PlanError(f"'{key}' of a plan rule is no list of words", got=found, expected='as ["conv"]')
    return tuple(found)


def check_together(path: str, grids: Sequence[Grid | None]) -> None:
    """Integers of operands that have a scale as it comes are multiplied by those of operands that have one, too."""
    by_token = {grid.granularity == "token" for grid in grids if grid is not None}
    if len(by_token) > 1:
        raise PlanError(
            f"the plan gives scales by the token to a part of the operands of '{path}'",
            got=", ".join(map(str, grids)),
            expected="query, key, value and probabilities by the token, or none of them",
        )


def check_carries(denoiser: Denoiser, path: str, port: str, grid: Grid | None) -> None:
    """Weights may have scales per channel or group; activations one per tensor or per token, and probabilities powers of two."""
    if grid is None:
        return
    allowed = CARRIED.get(port, ("tensor",))
    if grid.granularity not in allowed:
        raise PlanError(f"'{path}:{port}' cannot carry {grid}", expected=f"a grid per {' or '.join(allowed)}")
    if grid.granularity == "token" and not (grid.signed == (port != "probabilities") and grid.symmetric):
        wanted = (
            "an unsigned one, as uint8/token/sym"
            if port == "probabilities"
            else "a signed one, as int8/token"
        )
        raise PlanError(
            f"'{path}:{port}' cannot carry {grid}", expected=f"zeros that stay zeros, and {wanted}"
        )
    if grid.codebook and SIGNED_CODEBOOKS.get(port) is not grid.signed:
        raise PlanError(
            f"'{path}:{port}' cannot carry {grid}",
            expected="codebooks of weights, as int2/channel/codebook, and of what layers read, as uint4/tensor/codebook",
        )
    if grid.group:
        inputs = denoiser.model.get_submodule(path).weight[0].numel()  # type: ignore[index]
        if inputs % grid.group:
            raise PlanError(
                f"'{path}:{port}' cannot carry {grid}",
                got=f"{inputs} inputs, which groups of {grid.group} do not divide",
                fix="choose another group size, or one scale per channel",
            )
