"""Denoiser: one adapter around any declared diffusers model."""

from __future__ import annotations

import copy
import inspect
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from typing import Any, cast

import torch
from diffusers import ModelMixin
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from stepquant.core.digest import tensors_digest, value_digest
from stepquant.errors import ModelError
from stepquant.models.families.family import matches
from stepquant.models.families.registry import family_of, is_declared, is_generic
from stepquant.models.families.roles import FLOAT, LEAVES, part_roles
from stepquant.models.products import multiplies
from stepquant.models.split import SplitLayer

COMPONENTS = ("unet", "transformer")  # of a pipeline, the usual ones that denoise
CHOSEN = "_denoises_by"  # attribute of a copy of a pipeline: which of its denoisers is meant


def device_of(module: nn.Module) -> torch.device:
    return next(chain(module.parameters(), module.buffers())).device


def outermost(path: str) -> str:
    """`down_blocks.0` of `down_blocks.0.resnets.1`."""
    parts = path.split(".")
    number = next((place for place, part in enumerate(parts) if part.isdigit()), len(parts))
    return ".".join(parts[: number + 1])


@dataclass(frozen=True)
class Seen:
    """What a call has shown of a model that nobody declared."""

    roles: Mapping[str, str] = field(default_factory=dict)  # path -> role
    blocks: tuple[str, ...] = ()  # in the order in which they ran
    in_float: Mapping[str, str] = field(default_factory=dict)  # path of what can only stay so -> why

    def to_json(self) -> dict[str, Any]:
        return {"roles": dict(self.roles), "blocks": list(self.blocks), "in_float": dict(self.in_float)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Seen:
        return cls(dict(data["roles"]), tuple(data["blocks"]), dict(data["in_float"]))


class Denoiser:
    """What a model is called with, what it is built of, and what may be quantized; the model stays untouched."""

    expendable = False  # whether its float weights may go as soon as they are packed

    def __init__(self, model: nn.Module, seen: Seen | None = None, component: str | None = None) -> None:
        self.model, self.seen = model, seen
        self.family = family_of(model)
        self.component = component or self.family.component  # what its pipeline calls it: its folder

    def having(self, seen: Seen | None) -> Denoiser:
        """The same with what a call has shown of it."""
        return Denoiser(self.model, seen, self.component)

    def giving_up(self, weights: bool) -> Denoiser:
        """The same, whose float weights may go as soon as they are packed, or may not."""
        other = copy.copy(self)
        other.expendable = weights
        return other

    @classmethod
    def of(cls, pipeline: Any) -> Denoiser:
        """The denoiser of a diffusers pipeline: the first one, or that which was chosen of several."""
        found = denoisers(pipeline)
        name = getattr(pipeline, CHOSEN, None) or next(iter(found), None)
        if name is None:
            raise ModelError(
                "the pipeline has no denoiser",
                got=type(pipeline).__name__,
                expected="a diffusers pipeline with a `unet` or `transformer`, or a network that reads noise and a time",
            )
        return cls(found[name], component=name)

    @cached_property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of what is denoised."""
        config: Any = self.model.config
        size = config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return config.in_channels, height, width

    def sites(self) -> dict[str, str]:
        """Path -> role of every convolution and linear, in module order; exactly one declaration may claim each."""
        leaves = [
            name
            for name, module in self.model.named_modules()
            if isinstance(module, LEAVES)
            and module.weight.numel()
            and not any(matches(pattern, name) for pattern in self.family.read)
        ]
        claims: dict[str, list[str]] = {leaf: [] for leaf in leaves}
        modules = dict(self.model.named_modules())
        for name, module in modules.items():
            for child, role in part_roles(module).items():
                path = f"{name}.{child}" if name else child
                halves = (f"{path}.0", f"{path}.1") if isinstance(modules.get(path), SplitLayer) else (path,)
                for half in halves:
                    if half in claims:
                        claims[half].append(role)
        for pattern, role in self.family.top.items():
            for leaf in leaves:
                if matches(pattern, leaf):
                    claims[leaf].append(role)
        if self.family.generic:
            shown = {} if self.seen is None else self.seen.roles
            claims = {
                leaf: roles or [shown.get(leaf, kind_of(modules[leaf]))] for leaf, roles in claims.items()
            }
        for leaf, roles in claims.items():
            if len(roles) != 1:
                raise ModelError(
                    f"layer '{leaf}' has {'no role' if not roles else 'several roles: ' + ', '.join(roles)}",
                    where=type(self.model).__name__,
                    fix="declare its building block in stepquant/models/families/roles.py",
                )
        return {leaf: roles[0] for leaf, roles in claims.items()}

    def blocks(self) -> list[str]:
        """Paths of the blocks that are reconstructed, in the order in which they run."""
        return list(self.family.blocks(self.model) if self.seen is None else self.seen.blocks)

    def ends(self) -> tuple[str, ...]:
        """Paths of the first and the last of its outermost blocks: of a U-Net, the levels of the largest images."""
        beside = tuple(f"{path}." for path in self.family.prompt_blocks)
        blocks = [path for path in self.blocks() if not path.startswith(beside)]
        return tuple(dict.fromkeys(outermost(path) for path in (*blocks[:1], *blocks[-1:])))

    def deepest(self) -> str:
        """The block whose input features say most about a sample as a whole."""
        return self.family.deepest(self.blocks())

    def concats(self) -> dict[str, tuple[int, int]]:
        """Path -> (hidden, skip) widths of layers that read a concatenation."""
        return dict(self.family.concats(self.model))

    def products(self) -> list[str]:
        """Paths of modules that multiply query, key, value and probabilities."""
        return [name for name, module in self.model.named_modules() if multiplies(module)]

    def stays_float(self) -> dict[str, str]:
        """Path -> why, of the layers and attention products that no plan can quantize."""
        kinds = {
            name: (type(module), type(getattr(module, "processor", None)))
            for name, module in self.model.named_modules()
            if isinstance(module, LEAVES) or multiplies(module)
        }
        known = {name: FLOAT[kind] for name, both in kinds.items() for kind in both if kind in FLOAT}
        return known if self.seen is None else {**known, **self.seen.in_float}

    @cached_property
    def signature(self) -> inspect.Signature:
        return inspect.signature(type(self.model).forward)

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of one call by name, as the model received them."""
        bound = self.signature.bind(self.model, *args, **kwargs).arguments
        named = {
            name: value for name, value in bound.items() if name not in ("self", "return_dict", "kwargs")
        }
        return {name: value for name, value in named.items() if value is not None}

    @property
    def device(self) -> torch.device:
        return device_of(self.model)

    @property
    def dtype(self) -> torch.dtype:
        """Of what its float layers compute in."""
        kind: torch.dtype = cast(Any, self.model).dtype
        return kind

    def predict(self, arguments: Mapping[str, Any]) -> Tensor:
        """The model's prediction for recorded arguments, which may lie on another device."""
        given, known = self.there(arguments), self.signature.parameters
        absent = [name for name, one in known.items() if name not in ("self", *given) and is_needed(one)]
        wraps = {"return_dict": False} if "return_dict" in known else {}
        return prediction_of(self.model(**given, **dict.fromkeys(absent), **wraps))

    def there(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Recorded arguments where the model is."""
        device = self.device
        found: dict[str, Any] = tree_map(
            lambda x: x.to(device) if isinstance(x, Tensor) else x, dict(arguments)
        )
        return found

    @cached_property
    def output(self) -> type:
        """The class in which the model returns its prediction when it is asked for more than a tuple."""
        forward = type(self.model).forward
        names = vars(inspect.getmodule(forward))
        kinds = typing.get_type_hints(forward, names).get("return")
        # Where the annotation names none, it is the one that its module has imported.
        options = (*(typing.get_args(kinds) or (kinds,)), *names.values())
        return next(kind for kind in options if "sample" in getattr(kind, "__dataclass_fields__", ()))

    def digest(self) -> str:
        """SHA-256 of class, configuration and weights: the name of this model in every cache."""
        return self.digest_of(tensors_digest(self.model.state_dict()))

    def digest_of(self, weights: str) -> str:
        """The same, where the digest of the weights is known."""
        settings: Any = self.model.config
        config = {k: v for k, v in settings.items() if not k.startswith("_")}
        kind = [type(self.model).__name__, sorted(config.items())]
        return value_digest([kind, weights])


def denoisers(pipeline: Any) -> dict[str, nn.Module]:
    """Component -> network, of all that denoise in a pipeline: the usual ones first, the others by their type."""
    named = {name: getattr(pipeline, name, None) for name in COMPONENTS}
    others = {name: part for name, part in vars(pipeline).items() if is_denoiser(part)}
    found = {name: model for name, model in named.items() if model is not None} | others
    return {name: model for name, model in found.items() if first_name(found, model) == name}


def first_name(parts: Mapping[str, Any], wanted: Any) -> str:
    return next(name for name, part in parts.items() if part is wanted)


def is_denoiser(part: Any) -> bool:
    """Whether it reads noise and a time, and predicts: networks that control others do the first alone."""
    if not isinstance(part, nn.Module) or not isinstance(part, ModelMixin):
        return False
    return "ControlNet" not in type(part).__name__ and (is_declared(part) or is_generic(part))


def by_denoiser(pipeline: Any) -> list[Any]:
    """The pipeline once for each of its denoisers, which is then the one that `Denoiser.of` finds.

    The copies share all parts. One with a single denoiser is itself.
    """
    names = list(denoisers(pipeline))
    if len(names) <= 1 or hasattr(pipeline, CHOSEN):
        return [pipeline]
    copies = [copy.copy(pipeline) for _ in names]
    for name, one in zip(names, copies):
        vars(one)[CHOSEN] = name
    return copies


def is_needed(argument: inspect.Parameter) -> bool:
    """Whether a call must name it, be it as None."""
    return argument.default is argument.empty and argument.kind is argument.POSITIONAL_OR_KEYWORD


def prediction_of(out: Any) -> Tensor:
    """The first tensor of what a model returns, whatever it wraps it in; a list with one for each sample as one."""
    while not isinstance(out, Tensor):
        if isinstance(out, list) and len({part.shape for part in out if isinstance(part, Tensor)}) == 1:
            return torch.stack(out)
        out = next(iter(out.values())) if isinstance(out, Mapping) else out[0]
    return out


def kind_of(leaf: nn.Module) -> str:
    """The role of a leaf of which nothing else is known."""
    return "linear" if isinstance(leaf, nn.Linear) else "conv"


def twin(model: nn.Module) -> nn.Module:
    """A copy that reads the same weights: its layers can be exchanged, and nothing is there twice."""
    weights: dict[int, Any] = {
        id(weight): nn.Parameter(weight.detach(), requires_grad=False) for weight in model.parameters()
    }
    return copy.deepcopy(model, weights)


def check_finite(model: nn.Module) -> None:
    """A model with NaN or infinite weights cannot be quantized: name the first one."""
    for name, value in model.named_parameters():
        check_finite_weight(name, value, type(model).__name__)


def check_finite_weight(name: str, value: Tensor, where: str) -> None:
    # Of the extremes, without a mask as large as the weight.
    if value.is_floating_point() and value.numel() and not torch.stack(value.aminmax()).isfinite().all():
        raise ModelError(
            f"weight '{name}' holds NaN or infinite values",
            where=where,
            fix="load an intact checkpoint; fp16 weights may have overflowed when they were converted",
        )
