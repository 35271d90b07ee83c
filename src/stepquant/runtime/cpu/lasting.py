"""What of a recorded call follows from some arguments alone: from a text, which stays over the steps, or from t, which
comes back with the next image. It is computed once for each of their values, and kept.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stepquant.models.families.family import Family
from stepquant.runtime.cpu.recording import Call, Recording, Slots, made_of, needed

FEW = 64  # numbers at most of an argument that is known again by its values
KEPT_TEXTS = 2  # one with a prompt and one without may take turns
KEPT_BYTES = 64 << 20  # of what follows from t

# What a tensor follows from beside inputs: tensors that were there before the call, and what no part may keep.
CONSTANT, FLEETING = -1, -2
# The parts of a call; what follows from constants alone belongs to any of them.
TEXTS, NUMBERS, REST, ANY = range(4)
UNSAFE_VIEW = "aten::_unsafe_view"  # returns memory of its argument without saying so


class Recorded:
    """A recorded call in parts: what follows from texts alone, from a few numbers alone, and the rest."""

    def __init__(
        self,
        recording: Recording,
        count: int,
        out: Tensor | Sequence[Tensor],
        texts: Sequence[int],
        numbers: Sequence[int],
    ) -> None:
        """The first `count` slots are inputs; something may be kept of `texts` and of `numbers` among them."""
        self.texts, self.numbers, self.several = list(texts), list(numbers), not isinstance(out, Tensor)
        calls, origins = recording.calls, Origins(recording.calls, count)
        last = [recording.end(one) for one in ([out] if isinstance(out, Tensor) else out)]
        part_of = [part(origins.call(call), set(texts), set(numbers)) for call in calls]
        fixed = folded([call for call in calls if origins.call(call) <= {CONSTANT}])
        left = [place for place, call in enumerate(calls) if fixed.keys().isdisjoint(call.results)]
        calls, part_of = [calls[place] for place in left], [part_of[place] for place in left]
        self.fixed = list(fixed.values())
        if any(part(origins.of(end), set(texts), set(numbers)) != REST for end in last):
            part_of = [REST for _ in calls]  # a prediction is nobody else's memory
        made_in = {slot: its for call, its in zip(calls, part_of) for slot in call.results if its != ANY}
        ends: dict[int, list[int]] = {TEXTS: [], NUMBERS: [], REST: last}
        chosen: dict[int, list[Call]] = {}
        for own in (REST, NUMBERS, TEXTS):  # whoever reads comes before what it reads
            chosen[own] = needed([c for c, its in zip(calls, part_of) if its in (own, ANY)], ends[own])
            for slot in (*ends[own], *(slot for call in chosen[own] for slot in call.reads())):
                its = made_in.get(slot, own)
                if its != own and slot not in ends[its]:
                    ends[its].append(slot)
        known = [*range(count), *fixed]
        self.sequences: list[Any] = []
        for own in (TEXTS, NUMBERS, REST):
            self.sequences.append(made_of(chosen[own], known, ends[own]) if ends[own] else None)
            known += ends[own]

    def run(self, inputs: Sequence[Tensor], lasting: Sequence[Tensor]) -> Any:
        """The prediction, of inputs and of what was kept for them."""
        made = self.sequences[REST].run([*inputs, *self.fixed, *lasting])
        return made if self.several else made[0]


def same_bits(one: Any, other: Any) -> bool:
    """Of two predictions: a tensor each, or a list of them."""
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    return len(one) == len(other) and all(map(torch.equal, one, other))


def folded(calls: Sequence[Call]) -> dict[int, Tensor]:
    """Slots of what was looked up in constants by places that are constants: no sequence takes such places."""
    ends = [slot for call in calls if any(map(is_places, call.arguments)) for slot in call.results]
    known: dict[int, Any] = {}
    with torch.no_grad():
        for call in needed(calls, ends) if ends else ():
            made = call.again(known)
            known |= zip(call.results, made if isinstance(made, (tuple, list)) else [made])
    return {slot: known[slot] for slot in ends}


def is_places(value: Any) -> bool:
    return isinstance(value, Slots) and value.optional


def part(origins: set[int], texts: set[int], numbers: set[int]) -> int:
    if origins == {CONSTANT}:
        return ANY
    if origins <= texts | {CONSTANT}:
        return TEXTS
    return NUMBERS if origins <= numbers | {CONSTANT} else REST


class Lasting:
    """What was kept for the texts and numbers of former calls, of whatever kind."""

    def __init__(self) -> None:
        self.of_texts: list[OfTexts] = []
        self.of_numbers: dict[Recorded, dict[tuple[bytes, ...], list[Tensor]]] = {}
        self.room = KEPT_BYTES

    def clear(self) -> None:
        self.of_texts, self.of_numbers, self.room = [], {}, KEPT_BYTES

    def drop(self, call: object) -> None:
        """Let go of what was kept for this call."""
        if isinstance(call, Recorded):
            self.of_texts = [one for one in self.of_texts if one.call is not call]
            self.room += sum(map(size_of, self.of_numbers.pop(call, {}).values()))

    def of(self, call: Recorded, inputs: Sequence[Tensor]) -> list[Tensor]:
        """What `call` needs beside its inputs."""
        self.of_texts = [one for one in self.of_texts if one.lives()]
        with torch.inference_mode(False), torch.no_grad():
            texts = self.text(call, inputs) if call.sequences[TEXTS] is not None else []
            numbers = self.number(call, inputs, texts) if call.sequences[NUMBERS] is not None else []
        return [*texts, *numbers]

    def text(self, call: Recorded, inputs: Sequence[Tensor]) -> list[Tensor]:
        texts = [inputs[place] for place in call.texts]
        for one in self.of_texts:
            if one.call is call and one.is_of(texts):
                return one.made
        made: list[Tensor] = call.sequences[TEXTS].run([*inputs, *call.fixed])
        if not any(text.is_inference() for text in texts):  # whose changes nobody counts
            self.of_texts = [OfTexts.of(call, texts, made), *self.of_texts[: KEPT_TEXTS - 1]]
        return made

    def number(self, call: Recorded, inputs: Sequence[Tensor], texts: Sequence[Tensor]) -> list[Tensor]:
        key, kept = tuple(bytes_of(inputs[place]) for place in call.numbers), self.of_numbers
        found = kept.get(call, {}).get(key)
        if found is None:
            own = [x.clone() if place in call.numbers else x for place, x in enumerate(inputs)]
            found = call.sequences[NUMBERS].run([*own, *call.fixed, *texts])
            size = size_of(found)
            if (
                size <= self.room
            ):  # the first ones stay: steps come in turn, so that none of the last would be met again
                kept.setdefault(call, {})[key], self.room = found, self.room - size
        return found


class OfTexts(NamedTuple):
    """What follows from tensors, recognised by identity, while they are as they were."""

    call: Recorded
    texts: list[weakref.ref[Tensor]]
    versions: list[int]
    made: list[Tensor]

    @classmethod
    def of(cls, call: Recorded, texts: Sequence[Tensor], made: list[Tensor]) -> OfTexts:
        return cls(call, [weakref.ref(text) for text in texts], [text._version for text in texts], made)

    def lives(self) -> bool:
        return all(text() is not None for text in self.texts)

    def is_of(self, texts: Sequence[Tensor]) -> bool:
        return all(
            own() is text and not text.is_inference() and version == text._version
            for own, text, version in zip(self.texts, texts, self.versions)
        )


def places(family: Family, owners: Sequence[str], inputs: Sequence[Tensor]) -> tuple[list[int], list[int]]:
    """Of inputs that come back, by the arguments they are in: as the same tensors, texts above all, or as the same few
    numbers, as t does."""
    lasting = (family.t, *family.text, *family.cond, *family.shared)
    found: tuple[list[int], list[int]] = [], []
    for place, (owner, tensor) in enumerate(zip(owners, inputs)):
        if owner in lasting:
            found[tensor.numel() <= FEW].append(place)
    return found


def size_of(tensors: Sequence[Tensor]) -> int:
    """The bytes of memory that they lie in."""
    stores = (tensor.untyped_storage() for tensor in tensors)
    return sum({store.data_ptr(): store.nbytes() for store in stores}.values())


def bytes_of(x: Tensor) -> bytes:
    # A number that was expanded to a batch of one counts as contiguous, in steps of nothing.
    return x.clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8).numpy().tobytes()


class Origins:
    """What every tensor of a recorded call follows from; tensors that share memory follow from the same."""

    def __init__(self, calls: Sequence[Call], inputs: int) -> None:
        self.parents: dict[int, int] = {}
        for call in calls:
            for shared in shares(call):
                for result in call.results:
                    if self.root(result) != self.root(shared):
                        self.parents[self.root(result)] = self.root(shared)
        self.found: dict[int, set[int]] = {}
        for slot in range(inputs):
            self.of(slot).add(slot)
        self.spread(calls)
        given = {self.root(slot) for slot in range(inputs)}
        for (
            call
        ) in calls:  # nothing is kept of what changes an input, or could change a constant's numbers twice
            for slot in call.writes():
                if self.root(slot) in given or self.of(slot) == {CONSTANT}:
                    self.of(slot).add(FLEETING)
        self.spread(calls)

    def root(self, slot: int) -> int:
        while slot in self.parents:
            slot = self.parents[slot]
        return slot

    def of(self, slot: int) -> set[int]:
        return self.found.setdefault(self.root(slot), set())

    def call(self, call: Call) -> set[int]:
        """What a call reads, and what else reaches the memory that it returns."""
        found = set().union(*map(self.of, (*call.reads(), *call.results)))
        return found | {CONSTANT} if any(isinstance(value, Tensor) for value in call.arguments) else found

    def spread(self, calls: Sequence[Call]) -> None:
        """From what is read to what is made, until nothing is new: what is written last reaches all that share the memory."""
        grows = True
        while grows:
            grows = False
            for call in calls:
                found = self.call(call)
                for slot in (*call.results, *call.writes()):
                    if not found <= self.of(slot):
                        self.of(slot).update(found)
                        grows = True


def shares(call: Call) -> Iterator[int]:
    """Slots whose memory its results may share."""
    unsafe = call.func._schema.name == UNSAFE_VIEW
    for parameter, value in zip(call.func._schema.arguments, call.arguments):
        if (unsafe or parameter.alias_info is not None) and isinstance(value, Slots):
            yield from value.slots
