"""Call: the arguments of one use of a pipeline, as its user writes them; it makes one image, video or sound."""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load, save
from torch import Tensor
from torch.utils._pytree import tree_map

from stepquant.core.digest import tensors_digest
from stepquant.errors import StepquantError

STEPS = "num_inference_steps"
PACKED = "packed"  # marks JSON of a call that lacks nothing
MID_GREY = 128


@dataclass(frozen=True)
class Call:
    """Arguments by name, and the same as JSON, in which pictures and tensors are their sizes and digests."""

    arguments: Mapping[str, Any] = field(compare=False, repr=False)
    described: Mapping[str, Any]
    origin: str = field(default="", compare=False)  # where its user wrote it
    stands_in: bool = field(default=False, compare=False)  # its pictures and tensors have the sizes alone

    @classmethod
    def of(cls, arguments: Mapping[str, Any], origin: str = "") -> Call:
        return cls(dict(arguments), {name: describe(value) for name, value in arguments.items()}, origin)

    @classmethod
    def from_json(cls, described: Mapping[str, Any], origin: str = "") -> Call:
        """The call that was described so; what was described by its size has that size alone."""
        arguments = {name: restore(value) for name, value in described.items()}
        return cls(arguments, dict(described), origin, arguments != described)

    def packed(self) -> dict[str, Any]:
        """JSON that holds its pictures and tensors too, for another process."""
        values = {name: pack(value) for name, value in self.arguments.items()}
        return {PACKED: values, "origin": self.origin, "stands_in": self.stands_in}

    @classmethod
    def unpacked(cls, data: Mapping[str, Any]) -> Call:
        arguments = {name: restore(value) for name, value in data[PACKED].items()}
        return replace(cls.of(arguments, data["origin"]), stands_in=data["stands_in"])

    @property
    def text(self) -> str:
        """What the result is to show, where words say it."""
        prompt = self.arguments.get("prompt", "")
        return prompt if isinstance(prompt, str) else ""

    @property
    def steps(self) -> int | None:
        """The denoising steps that it asks for."""
        return self.arguments.get(STEPS)

    def there(self, device: torch.device, kind: torch.dtype) -> dict[str, Any]:
        """The arguments with all tensors on a device, and numbers narrower than what is computed there in its type."""

        def move(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            return value.to(
                device, torch.promote_types(value.dtype, kind) if value.is_floating_point() else None
            )

        moved: dict[str, Any] = tree_map(move, dict(self.arguments))
        return moved

    def __str__(self) -> str:
        return ", ".join(f"{name}={shown(value)}" for name, value in self.arguments.items())


Asked = str | Call


def describe(value: Any) -> Any:
    """A value as JSON."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Image.Image):
        return {"picture": picture_digest(value), "mode": value.mode, "size": list(value.size)}
    if isinstance(value, np.ndarray):
        return describe(torch.from_numpy(value)) | {"array": True}
    if isinstance(value, Tensor):
        kind = str(value.dtype).removeprefix("torch.")
        return {"tensor": tensors_digest({"": value}), "dtype": kind, "shape": list(value.shape)}
    if isinstance(value, Mapping):
        return {str(name): describe(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [describe(one) for one in value]
    raise StepquantError(
        "a call cannot hold such a value",
        got=type(value).__name__,
        expected="a number, a text, a picture, a tensor, or lists of these",
    )


def pack(value: Any) -> Any:
    """A value as JSON that lacks nothing."""
    if isinstance(value, Image.Image):
        buffer = io.BytesIO()
        value.save(buffer, format="PNG")
        return {"png": base64.b64encode(buffer.getvalue()).decode()}
    if isinstance(value, np.ndarray):
        return pack(torch.from_numpy(np.ascontiguousarray(value))) | {"array": True}
    if isinstance(value, Tensor):
        return {"safetensors": base64.b64encode(save({"": value.detach().cpu().contiguous()})).decode()}
    if isinstance(value, Mapping):
        return {str(name): pack(one) for name, one in value.items()}
    return [pack(one) for one in value] if isinstance(value, list | tuple) else value


def restore(described: Any) -> Any:
    """A value that is packed, or described: grey pictures, and tensors of ones, which as a mask hide nothing."""
    if isinstance(described, list):
        return [restore(one) for one in described]
    if not isinstance(described, Mapping):
        return described
    if "png" in described:
        picture = Image.open(io.BytesIO(base64.b64decode(described["png"])))
        picture.load()
        return picture
    if "safetensors" in described:
        kept = load(base64.b64decode(described["safetensors"]))[""]
        return kept.numpy() if described.get("array") else kept
    if "picture" in described:
        size: tuple[int, int] = tuple(described["size"])
        return Image.new("L", size, MID_GREY).convert(described["mode"])
    if "tensor" in described:
        ones = torch.ones(described["shape"], dtype=getattr(torch, described["dtype"]))
        return ones.numpy() if described.get("array") else ones
    return {name: restore(one) for name, one in described.items()}


def picture_digest(picture: Image.Image) -> str:
    return hashlib.sha256(f"{picture.mode}|{picture.size}|".encode() + picture.tobytes()).hexdigest()


def shown(value: Any) -> str:
    """A value in a few words."""
    if isinstance(value, Image.Image):
        return f"<picture {value.width}x{value.height}>"
    if isinstance(value, Tensor | np.ndarray):
        return f"<tensor {'x'.join(map(str, value.shape))}>"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(shown, value))}]"
    return repr(value) if len(repr(value)) <= 60 else f"{repr(value)[:60]}..."


def described(asked: Asked) -> Any:
    """What was asked, as JSON."""
    return dict(asked.described) if isinstance(asked, Call) else asked


def texts(asked: Sequence[Asked]) -> list[str]:
    """What was asked, in words; nothing where one of them has none."""
    words = [one.text if isinstance(one, Call) else one for one in asked]
    return words if all(words) else []


def steps_of(asked: Sequence[Asked], given: int | None) -> int | None:
    """The denoising steps that calls ask for, else those that are `given`; numbers that differ are an error."""
    calls = [one for one in asked if isinstance(one, Call)]
    numbers = {one.steps: one for one in reversed(calls)}
    if len(numbers) > 1:
        first, other = list(numbers.values())[::-1][:2]
        raise StepquantError(
            f"all calls need the same {STEPS}: results are told by step",
            where=other.origin,
            got=other.steps,
            expected=first.steps,
            fix="write the same number into each, or quantize for one of them",
        )
    own = next(iter(numbers), None)
    if own is not None and given not in (None, own):
        raise StepquantError(
            f"the calls and --steps say the same thing: {STEPS} {own} and --steps {given}",
            fix="give one of them",
        )
    return given if own is None else own
