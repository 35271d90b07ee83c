"""How an operation is defined: once, as a function in plain torch that states what it computes.

From it follow the schema of `torch.ops.stepquant`, the default on every device, and the shapes that torch.compile and
torch.export ask for. A device that does better registers a kernel of its own with torch's dispatcher.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Generic, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from stepquant.errors import RuntimeSupportError
from stepquant.runtime.ops.code import Code

P = ParamSpec("P")
R = TypeVar("R")  # a tensor, or a tuple of them

LIBRARY = torch.library.Library("stepquant", "FRAGMENT")
TYPES = {
    "Tensor": "Tensor",
    "Tensor | None": "Tensor?",
    "float": "float",
    "int": "int",
    "bool": "bool",
    "str": "str",
    "Sequence[int]": "int[]",
    "torch.dtype": "ScalarType",
}
RESULTS = {"Tensor": "Tensor", "tuple[Tensor, Tensor]": "(Tensor, Tensor)"}
# What torch says, beside NotImplementedError, where a device lacks an operation or a dtype.
LACKING = ("not implemented for", "doesn't support float64")
DEFAULTS = {inspect.Parameter.empty: "", None: "=None", False: "=False", True: "=True"}


class Operation(Generic[P, R]):
    """What `torch.ops.stepquant.<name>` does for the arguments of the function that defines it.

    `plain` is that function. A `Code` stands for four numbers of the schema, and is given by position.
    """

    def __init__(self, plain: Callable[P, R]) -> None:
        name = plain.__name__
        LIBRARY.define(f"{name}{schema(plain)}", tags=torch.Tag.pt2_compliant_tag)
        self.plain, self.__doc__ = plain, plain.__doc__
        self.overload: Any = getattr(torch.ops.stepquant, name).default
        self.flat = with_codes(plain)  # for the arguments of the schema
        self.default = explained(name, self.flat)  # on devices without a kernel of their own
        torch.library.impl(f"stepquant::{name}", "default", self.default, lib=LIBRARY)
        fake = without_numbers(self.overload, self.flat)
        torch.library.register_fake(f"stepquant::{name}", fake, lib=LIBRARY)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        flat: list[object] = []
        for value in args:
            if isinstance(value, Code):
                flat += value
            else:
                flat.append(value)
        return self.overload(*flat, **kwargs)  # type: ignore[no-any-return]


def schema(plain: Callable[..., Any]) -> str:
    """The arguments and the result of a function in the words of torch's dispatcher."""
    words, signature = [], inspect.signature(plain)
    for name, parameter in signature.parameters.items():
        if parameter.annotation == "Code":
            words += [f"float {name}_scale", *(f"int {name}_{part}" for part in Code._fields[1:])]
        else:
            default = parameter.default
            text = f'="{default}"' if isinstance(default, str) else DEFAULTS[default]
            words.append(f"{TYPES[parameter.annotation]} {name}{text}")
    return f"({', '.join(words)}) -> {RESULTS[signature.return_annotation]}"


def with_codes(plain: Callable[..., Any]) -> Callable[..., Any]:
    """`plain` for the arguments of its schema."""
    codes = [parameter.annotation == "Code" for parameter in inspect.signature(plain).parameters.values()]

    def flat(*args: Any, **kwargs: Any) -> Any:
        values, rest = [], iter(args)
        for is_code, first in zip(codes, rest):
            values.append(Code(first, *(next(rest) for _ in Code._fields[1:])) if is_code else first)
        return plain(*values, **kwargs)

    return flat


def explained(name: str, flat: Callable[..., Any]) -> Callable[..., Any]:
    """`flat`, which says of which operation it is a part when a device lacks something that it is made of."""

    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return flat(*args, **kwargs)
        except (RuntimeError, TypeError) as error:
            if not isinstance(error, NotImplementedError) and not any(
                words in str(error) for words in LACKING
            ):
                raise
            tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
            kinds = sorted({f"{tensor.dtype} on {tensor.device}" for tensor in tensors})
            raise RuntimeSupportError(
                f"operation '{name}' has no kernel for {', '.join(kinds)}, and plain torch has none there either",
                got=str(error).strip().splitlines()[0][:200],
                expected="bfloat16 or float32 on a device on which torch has this operation; 'cpu' has all",
                fix="move the model back with `to('cpu')`, or let torch compute this one operation on the CPU "
                "(on 'mps': PYTORCH_ENABLE_MPS_FALLBACK=1)",
            ) from error

    return run


def without_numbers(overload: Any, flat: Callable[..., Any]) -> Callable[..., Any]:
    """For tensors without numbers only: one on the meta device among others would make up the result."""
    name, parameters = overload._opname, [argument.name for argument in overload._schema.arguments]

    def fake(*args: Any, **kwargs: Any) -> Any:
        given = dict(zip(parameters, args)) | kwargs
        real = [place for place, value in given.items() if has_numbers(value)]
        absent = [place for place, value in given.items() if isinstance(value, Tensor) and value.is_meta]
        if real and absent:
            raise RuntimeSupportError(
                f"operation '{name}' cannot compute: argument '{absent[0]}' is on the meta device, where it has no numbers",
                got=f"{', '.join(absent)} on meta, {', '.join(real)} with numbers",
                expected="all tensors on one device",
                fix="load what was offloaded before the call: accelerate.hooks.remove_hook_from_submodules(model)",
            )
        return flat(*args, **kwargs)

    return fake


def has_numbers(value: object) -> bool:
    return isinstance(value, Tensor) and not value.is_meta and not isinstance(value, FakeTensor)
