"""One call of a model as a recorded sequence of operations: what Python decides is decided once for each kind of call.

A kind is told by the shapes, strides and dtypes of the tensors and by the values of all else. The first call of a kind
runs as ever, the second is recorded and its sequence is run at once and compared, bit by bit; from the third on only
the sequence runs. Whatever cannot be recorded, or is being watched, runs as ever.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, ValuesView
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from stepquant.models.attention import KeepProduct
from stepquant.models.families.registry import family_of
from stepquant.runtime import ops
from stepquant.runtime.adapters.present import Layout, adapters_in, scaled, settings_of
from stepquant.runtime.blocks.chain import Chain, chains
from stepquant.runtime.blocks.install import Install
from stepquant.runtime.blocks.texts import Texts
from stepquant.runtime.blocks.time_rows import Row, TimeRows
from stepquant.runtime.cpu.lasting import Lasting, Recorded, places, same_bits
from stepquant.runtime.cpu.recording import Recording, UnrecordableError
from stepquant.runtime.finite import NotFinite
from stepquant.runtime.layers.offloaded import OFFLOADED, on_disk
from stepquant.runtime.layers.stored import Stored
from stepquant.runtime.turns import Turns

KEPT_KINDS = 64
KNOWN_VALUES = (bool, int, float, str, type(None))


class Replay:
    """Takes the place of a model's forward; its prediction comes from a recorded sequence where there is one."""

    def __init__(self, model: nn.Module, times: TimeRows | None, texts: Texts, text: str | None) -> None:
        self.model, self.times = model, times
        self.texts, self.text = texts, text  # by the name of the argument
        # None: seen once; False: cannot be recorded
        self.sequences: OrderedDict[Any, Recorded | bool | None] = OrderedDict()
        self.lasting = Lasting()
        self.rests_on: State | None = None
        self.output: type | None = None  # what the model wraps its prediction in
        self.family = family_of(model)
        self.names = list(inspect.signature(type(model).forward).parameters)[1:]
        self.turns, self.not_finite = Turns(), NotFinite()
        setters = [module.__dict__.get("set_processor") for module in model.modules()]
        self.keeps = [setter for setter in setters if isinstance(setter, KeepProduct)]
        self.layout = Layout(model.modules())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.own_forward(*args, **kwargs)
        arguments = dict(zip(self.names, args)) | kwargs
        wrapped = arguments.pop("return_dict", True)
        with self.turns:
            self.catch_up()
            if not self.watch.adapters:
                prediction, made = self.begin(arguments, wrapped, lambda: self.own_forward(*args, **kwargs))
            else:
                with scaled(self.model, arguments) as left:
                    call = partial(self.own_forward, **left, return_dict=wrapped)
                    prediction, made = self.begin(left, wrapped, call)
        if prediction is not None:
            out = prediction()
            made = self.output(sample=out) if wrapped and self.output else (out,)
        self.look(arguments, made[0])
        return made

    def begin(
        self, arguments: dict[str, Any], wrapped: bool, forward: Callable[[], Any]
    ) -> tuple[Callable[[], Any] | None, Any]:
        """What makes the prediction, in any thread; or None, and what the model's own forward made."""
        prediction = None if wrapped and self.output is None else self.predict(arguments)
        made = forward() if prediction is None else None
        if wrapped and made is not None:
            self.output = type(made)
        return prediction, made

    def catch_up(self) -> None:
        """Fuse the blocks anew where somebody has put other modules into the model, as who loads adapters does."""
        for keep in self.keeps:
            keep.catch_up()
        if self.layout.changed():
            self.times, self.texts = Install(self.model)()
            self.forget()
            self.layout = Layout(self.model.modules())
            self.__dict__.pop("watch", None)

    def look(self, arguments: dict[str, Any], out: Any) -> None:
        x, t = (arguments.get(name) for name in (self.family.x, self.family.t))
        if isinstance(x, Tensor) and t is not None and isinstance(out, Tensor) and not watched():
            self.not_finite.warn("input", x, t)
            self.not_finite.warn("prediction", out, t)

    def own_forward(self, *args: Any, **kwargs: Any) -> Any:
        return type(self.model).forward(self.model, *args, **kwargs)

    def predict(self, arguments: dict[str, Any]) -> Callable[[], Any] | None:
        """What makes the prediction by a sequence, in any thread; None where the model's own forward must."""
        family, watch = self.family, self.watch
        if not ops.compiled() or torch.is_grad_enabled() or watched() or any(watch.hooks):
            return None
        # What becomes of a float t is the model's own affair.
        x, t = arguments.get(family.x), arguments.get(family.t)
        if not isinstance(x, Tensor | list) or not isinstance(t, (int, Tensor)):
            return None
        arguments = arguments | {family.t: torch.as_tensor(t)}
        owners, tensors, kind = kind_of(arguments)
        if kind is None:
            return None
        if self.rests_on is not None and not self.rests_on.still(watch):
            self.forget()
        unchanged = self.rests_on is not None
        row = self.row_of(arguments[family.t], unchanged)
        pairs = self.texts.of(arguments.get(self.text), unchanged) if self.text is not None else None
        known = () if row is None else (row.projection, row.embedding, *row.blocks)
        present = self.present
        inputs = [*tensors, *known, *present, *(rows for pair in pairs or () for rows in pair)]
        # One tensor in two places is another kind: a sequence would take both for the same ever after.
        seen: dict[int, int] = {}
        same = tuple(seen.setdefault(id(tensor), place) for place, tensor in enumerate(tensors))
        key = (kind, same, row is None, pairs is None, watch.stepped[0].row if watch.stepped else 0)
        if key not in self.sequences:
            self.keep(key, None)
            return None
        self.sequences.move_to_end(key)
        sequence = self.sequences[key]
        if sequence is None:
            out = None if offloads(watch) else self.record(key, arguments, inputs, owners)
            return None if out is None else lambda: out
        if isinstance(sequence, bool):
            return None
        lasting = self.lasting.of(sequence, inputs)
        return lambda: sequence.run(inputs, lasting)

    @cached_property
    def watch(self) -> Watch:
        return Watch.of(self.model)

    @property
    def most(self) -> int:
        """Sequences to keep: a sampler comes by every row of the ranges before it returns to the first."""
        steps = getattr(self.model, "steps", None)
        return KEPT_KINDS * (1 if steps is None else int(steps.spec.groups))

    @property
    def present(self) -> list[Tensor]:
        """What tabled layers read in this call."""
        rows = getattr(getattr(self.model, "steps", None), "present", None)
        return [] if rows is None else [rows]

    def row_of(self, t: Tensor, unchanged: bool) -> Row | None:
        return None if self.times is None else self.times.row_of(t.reshape(-1), unchanged)

    def record(self, key: Any, arguments: dict[str, Any], inputs: list[Tensor], owners: list[str]) -> Any:
        """Run the model's own forward and remember what it did, if that can be done again."""
        recording = Recording(inputs)
        # Every step would keep its own where each has its own ranges.
        stays = ([], []) if self.watch.stepped else places(self.family, owners, inputs)
        self.keep(key, False)
        try:
            with recording:
                out = self.own_forward(**arguments, return_dict=False)[0]
            sequence = Recorded(recording, len(inputs), out, *stays)
        except UnrecordableError:
            return None
        if same_bits(sequence.run(inputs, self.lasting.of(sequence, inputs)), out):
            self.keep(key, sequence)
            self.rests_on = State(self.watch)
        else:
            self.lasting.drop(sequence)
        return out

    def forget(self) -> None:
        self.sequences.clear()
        self.lasting.clear()
        self.rests_on = None

    def keep(self, key: Any, sequence: Recorded | bool | None) -> None:
        self.sequences[key] = sequence
        if len(self.sequences) > self.most:
            self.lasting.drop(self.sequences.popitem(last=False)[1])

    def __getstate__(self) -> dict[str, Any]:
        own = {name: value for name, value in self.__dict__.items() if name != "watch"}
        return own | {"sequences": OrderedDict(), "lasting": Lasting(), "rests_on": None}


@dataclass(frozen=True)
class Watch:
    """Where to look, before each call, for what would make a sequence another one."""

    hooks: list[Any]  # of all modules but the model itself, whose own run around the sequence
    attributes: list[dict[str, Any]]
    tensors: list[ValuesView[Any]]  # parameters and buffers of the modules that have any
    bound: list[dict[str, Any]]  # of the modules with a forward of their own
    stored: list[dict[str, Any]]  # attributes of the modules that derive something from their buffers
    states: list[Callable[[], list[Any]]]
    stepped: list[Any]  # modules with ranges for every step; all read the same row
    adapters: list[nn.Module]

    @classmethod
    def of(cls, model: nn.Module) -> Watch:
        modules = list(model.modules())
        return cls(
            [hooks for m in modules[1:] for hooks in (m._forward_hooks, m._forward_pre_hooks)],
            [module.__dict__ for module in modules],
            [found.values() for m in modules for found in (m._parameters, m._buffers) if found],
            [module.__dict__ for module in modules if "forward" in module.__dict__],
            [module.__dict__ for module in modules if isinstance(module, Stored)],
            [one.state for one in chains(model) if type(one).state is not Chain.state],
            [module for module in modules if getattr(module, "stepped", False)],
            adapters_in(model),
        )


class State:
    """What a sequence rests on: the forwards and kernels in their places, and what chains ask before they run."""

    def __init__(self, watch: Watch) -> None:
        self.places, self.parts = count(watch), parts(watch)
        self.tensors = list(chain.from_iterable(watch.tensors))
        present = [tensor for tensor in self.tensors if tensor is not None]
        self.versions = torch.classes.stepquant.Versions(present)

    def still(self, watch: Watch) -> bool:
        return count(watch) == self.places and parts(watch) == self.parts and self.same_numbers(watch)

    def same_numbers(self, watch: Watch) -> bool:
        now = list(chain.from_iterable(watch.tensors))
        same = len(now) == len(self.tensors) and all(map(is_, now, self.tensors))
        return same and self.versions.same()  # type: ignore[no-any-return]


def offloads(watch: Watch) -> bool:
    """Whether tensors come and go with the calls of modules: a sequence would hold them for ever."""
    return any(OFFLOADED in attributes or on_disk(attributes) for attributes in watch.attributes[1:])


def parts(watch: Watch) -> list[Any]:
    """Things that are equal only if they are the same."""
    found = [attributes.get("forward") for attributes in watch.bound]
    found += [attributes["ready"] for attributes in watch.stored]
    for state in watch.states:
        found += state()
    return found + settings_of(watch.adapters)


def count(watch: Watch) -> int:
    """Attributes of all modules: a forward bound where there was none is one more."""
    return sum(map(len, watch.attributes))


def watched() -> bool:
    """Whether somebody follows the operations of this call one by one."""
    return bool(
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or nn.modules.module._has_any_global_hook()
        or torch.is_autocast_enabled("cpu")
    )


def kind_of(arguments: dict[str, Any]) -> tuple[list[str], list[Tensor], Any]:
    """The tensors among the arguments with the names of these, and what tells this kind of call from others; None if that
    cannot be told."""
    names = tuple(name for name, value in arguments.items() if value is not None)
    leaves, tree = tree_flatten([arguments[name] for name in names])
    owner_of = [name for name, inside in zip(names, tree.children()) for _ in range(inside.num_leaves)]
    key: list[Any] = [names, tree]
    owners, tensors = [], []
    for owner, leaf in zip(owner_of, leaves):
        if isinstance(leaf, Tensor) and leaf.is_cpu and type(leaf) in (Tensor, nn.Parameter):
            owners.append(owner)
            tensors.append(leaf)
            key.append((leaf.shape, leaf.stride(), leaf.dtype))
        elif isinstance(leaf, KNOWN_VALUES):
            key.append((type(leaf), leaf))
        else:
            return [], [], None
    return owners, tensors, tuple(key)
