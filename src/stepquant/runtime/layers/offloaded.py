"""Tensors that are elsewhere between the calls of their modules, and who brings them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from stepquant.errors import RuntimeSupportError

OFFLOADED = "_hf_hook"  # accelerate's hook, which brings a module's tensors for the time of its call
HOOKED = "_diffusers_hook"  # diffusers' hooks of a module; one of them may bring those of all modules inside
GROUP = "group_offloading"


def on_disk(attributes: dict[str, Any]) -> bool:
    """Whether diffusers keeps the tensors of a module with these attributes in a file between its calls.

    What stands in their places then is memory that nobody wrote, on the same device.
    """
    hooks = attributes.get(HOOKED)
    hook = None if hooks is None else hooks.get_hook(GROUP)
    return hook is not None and hook.group.offload_to_disk_path is not None


def around(root: nn.Module, modules: Iterable[nn.Module]) -> list[nn.Module]:
    """The modules below `root` that hold one of these, and these themselves."""
    wanted = set(modules)
    paths = [path.split(".") for path, module in root.named_modules() if module in wanted]
    above = {".".join(path[:end]) for path in paths for end in range(1, len(path) + 1)}
    return [root.get_submodule(path) for path in sorted(above)]


def check_present(model: nn.Module, asked: str) -> None:
    """What reads all tensors of a model must not meet those that a file took the place of."""
    for path, module in model.named_modules():
        if on_disk(vars(module)):
            raise RuntimeSupportError(
                f"{asked}: enable_group_offload(offload_to_disk_path=...) took the tensors away",
                where=path,
                fix="load the model anew, and do this before offloading it",
            )


def refuse_absent(model: nn.Module, _prefix: str, _keep_vars: bool) -> None:
    """What asking for a state dict does first, as who saves a model does."""
    check_present(model, "state_dict()")
