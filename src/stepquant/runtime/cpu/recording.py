"""Recording the torch operations of a call, to run them again on other tensors of the same shapes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary


class UnrecordableError(Exception):
    """A call does something that a sequence of operations cannot."""


class Recording(TorchDispatchMode):
    """Every operation while it is entered, with the slots that its tensors come from and go to."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.slots: Any = WeakIdKeyDictionary()
        self.count = 0
        self.calls: list[Call] = []
        for tensor in inputs:
            self.slots[tensor] = self.count
            self.count += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.data_dependent_output in func.tags or torch.Tag.nondeterministic_seeded in func.tags:
            raise UnrecordableError(f"{func} reads values or draws numbers")
        values = by_schema(func._schema, args, kwargs or {})
        arguments = [
            self.source(value, "Optional" in str(parameter.type))
            for value, parameter in zip(values, func._schema.arguments)
        ]
        out = func(*args, **(kwargs or {}))
        results = out if isinstance(out, (tuple, list)) else [out]
        if not all(isinstance(result, Tensor) for result in results):
            raise UnrecordableError(f"{func} returns something else than tensors")
        self.calls.append(Call(func, arguments, [self.target(result) for result in results]))
        return out

    def source(self, value: Any, optional: bool = False) -> Any:
        if isinstance(value, Tensor):
            slot = self.slots.get(value)
            return Slots((slot,)) if slot is not None else value
        if isinstance(value, (tuple, list)) and value and isinstance(value[0], Tensor):
            slots = tuple(self.slots.get(tensor, -1) for tensor in value)
            if -1 in slots:
                raise UnrecordableError("a list holds a constant")
            return Slots(slots, several=True, optional=optional)
        return value

    def target(self, tensor: Tensor) -> int:
        """The slot of a result; what was changed in place keeps its own."""
        slot = self.slots.get(tensor)
        if slot is None:
            slot = self.slots[tensor] = self.count
            self.count += 1
        return int(slot)

    def end(self, output: Tensor) -> int:
        """The slot of an output."""
        slot = self.slots.get(output) if isinstance(output, Tensor) else None
        if slot is None:
            raise UnrecordableError("an output is a constant")
        return int(slot)

    def sequence(self, inputs: int, outputs: Sequence[Tensor]) -> Any:
        """What was recorded, without what no output needs."""
        ends = [self.end(output) for output in outputs]
        return made_of(needed(self.calls, ends), range(inputs), ends)


class Call(NamedTuple):
    """One operation, with a slot for each result, or -1."""

    func: Any
    arguments: list[Any]
    results: list[int]

    def reads(self) -> Iterator[int]:
        for value in self.arguments:
            if isinstance(value, Slots):
                yield from value.slots

    def again(self, known: dict[int, Any]) -> Any:
        """What it returns for these values of slots."""

        def of(value: Any) -> Any:
            if not isinstance(value, Slots):
                return value
            found = [known[slot] for slot in value.slots]
            return found if value.several else found[0]

        values = [
            (parameter, of(value)) for parameter, value in zip(self.func._schema.arguments, self.arguments)
        ]
        named = {parameter.name: value for parameter, value in values if parameter.kwarg_only}
        return self.func(*(value for parameter, value in values if not parameter.kwarg_only), **named)

    def writes(self) -> Iterator[int]:
        """Slots of what it changes in place."""
        for parameter, value in zip(self.func._schema.arguments, self.arguments):
            if writes_into(parameter) and isinstance(value, Slots):
                yield from value.slots


def needed(calls: Sequence[Call], ends: Iterable[int]) -> list[Call]:
    """The calls that these slots follow from, and all that change something in place."""
    slots, kept = set(ends), []
    for call in reversed(calls):
        if call.func._schema.is_mutable or slots.intersection(call.results):
            refuse_changed_constants(call)
            results = [slot if slot in slots else -1 for slot in call.results]
            slots.update(call.reads())
            kept.append(call._replace(results=results))
    return kept[::-1]


def made_of(calls: Sequence[Call], inputs: Iterable[int], ends: Iterable[int]) -> Any:
    """The sequence of these calls, whose inputs are these slots."""
    places = {slot: place for place, slot in enumerate(inputs)}
    made = torch.classes.stepquant.Sequence(len(places))
    for func, arguments, results in calls:
        made.call(func._schema.name, func._schema.overload_name)
        for parameter, value in zip(func._schema.arguments, arguments):
            push(made, str(parameter.type), value.at(places) if isinstance(value, Slots) else value)
        made.store([-1 if slot < 0 else places.setdefault(slot, len(places)) for slot in results])
    made.finish([places[slot] for slot in ends])
    return made


class Slots:
    """Where the tensors of an argument come from."""

    def __init__(self, slots: tuple[int, ...], several: bool = False, optional: bool = False) -> None:
        """`optional`: some of several might be left out, as the places by which a tensor is indexed."""
        self.slots, self.several, self.optional = slots, several, optional

    def at(self, places: dict[int, int]) -> Slots:
        """The same where slots have these places."""
        return Slots(tuple(places[slot] for slot in self.slots), self.several, self.optional)


def by_schema(schema: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Iterator[Any]:
    """One value for each parameter of the operation."""
    for index, parameter in enumerate(schema.arguments):
        if index < len(args):
            yield args[index]
        elif parameter.name in kwargs:
            yield kwargs[parameter.name]
        else:
            yield parameter.default_value


def writes_into(parameter: Any) -> bool:
    return parameter.alias_info is not None and parameter.alias_info.is_write


def refuse_changed_constants(call: Call) -> None:
    for parameter, value in zip(call.func._schema.arguments, call.arguments):
        if writes_into(parameter) and isinstance(value, Tensor):
            raise UnrecordableError(f"{call.func} writes into a constant")


def push(made: Any, kind: str, value: Any) -> None:
    """Hand one argument over in the type that the operation's schema asks for."""
    if isinstance(value, Slots):
        if value.several and "Optional" in kind:
            raise UnrecordableError(f"an argument is a {kind}")
        made.push_slots(list(value.slots)) if value.several else made.push_slot(value.slots[0])
    elif value is None:
        made.push_none()
    elif isinstance(value, Tensor):
        made.push_tensor(value)
    elif "Tensor" in kind and isinstance(value, (bool, int, float)):
        made.push_tensor(torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else None))
    elif isinstance(value, bool):
        made.push_bool(value)
    elif isinstance(value, float) or (
        kind.startswith(("float", "Optional[float")) and isinstance(value, int)
    ):
        made.push_float(float(value))
    elif isinstance(value, str):
        made.push_text(value)
    elif isinstance(value, torch.device):
        made.push_device(value)
    elif kind == "List[Optional[number]]":
        if value:
            raise UnrecordableError("an argument is a list of numbers of any kind")
        made.push_no_numbers()
    elif isinstance(value, (tuple, list)):
        if "Tensor" in kind:
            raise UnrecordableError(f"an argument is a {kind} of constants")
        made.push_floats(list(value)) if any(isinstance(v, float) for v in value) else made.push_ints(
            list(value)
        )
    elif isinstance(value, (int, torch.dtype, torch.layout, torch.memory_format)):
        made.push_int(value)
    else:
        raise UnrecordableError(f"an argument is a {type(value).__name__}")
