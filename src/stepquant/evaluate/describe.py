"""What a results file says about its making: model, machine, versions, method, scheme and plan."""

from __future__ import annotations

import base64
import io
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from stepquant import hub
from stepquant.evaluate.metrics.measure import as_saved
from stepquant.evaluate.several import text_of
from stepquant.models import zoo
from stepquant.models.denoiser import Denoiser, Seen, by_denoiser
from stepquant.models.families.roles import embeddings_in
from stepquant.quant.plan import Plan
from stepquant.version import __version__


def describe_float(pipeline: Any) -> dict[str, Any]:
    denoisers = [Denoiser.of(one) for one in by_denoiser(pipeline)]
    return {"name": model_name(pipeline)} | describe_networks(denoisers, [one.digest() for one in denoisers])


def describe_networks(denoisers: Sequence[Denoiser], digests: Sequence[str]) -> dict[str, Any]:
    """Class, parameters and digest of what denoises in a pipeline."""
    return {
        "class": text_of([(one.component, class_of(one)) for one in denoisers]),
        "parameters": sum(value.numel() for one in denoisers for value in one.model.parameters()),
        "digest": joined_digests(digests),
    }


def joined_digests(digests: Sequence[str]) -> str:
    return "+".join(digest[:12] for digest in digests)


def class_of(denoiser: Denoiser) -> str:
    """The class of the model, and whether anybody told stepquant about it."""
    name = type(denoiser.model).__name__
    return f"{name}, generic: no declaration" if denoiser.family.generic else name


def model_name(pipeline: Any) -> str:
    """How people call a pipeline: an embedded model by its name, a folder by its last part."""
    origin = str(pipeline.config.get("_name_or_path") or "")
    embedded = {str(zoo.path(name)): name for name in zoo.names()}
    if not origin:
        return type(pipeline).__name__
    if not Path(origin).is_dir():
        return origin
    return embedded.get(str(Path(origin).resolve()), Path(origin).resolve().name)


def describe_quantized(pipeline: Any) -> dict[str, Any]:
    """Method, scheme and recipe as the artifact stores them."""
    configs = [hub.config_of(Denoiser.of(one).model) for one in by_denoiser(pipeline)]
    found = {"name": model_name(pipeline), "method": "", "scheme": "", "digest": "", "recipe": {}}
    known = [config for config in configs if config is not None]
    if not known:
        return found
    config = known[0]
    recipe = {key: value for key, value in config.recipe.items() if key not in ("plan", "seen", "allocated")}
    recipe |= {name: len(recipe[name]) for name in ("prompts", "calls") if recipe.get(name)}
    named = {key: str(recipe.get(key) or "") for key in ("method", "scheme")}
    digest = joined_digests([config.digest for config in known])
    return found | named | {"digest": digest, "recipe": recipe}


def describe_plan(source: Denoiser, quantized: Denoiser) -> list[dict[str, Any]]:
    """What the artifact's plan decides for every site of the float model, and why."""
    config = hub.config_of(quantized.model)
    if config is None or not config.recipe.get("plan"):
        return []
    rules = config.recipe.get("allocated") or config.recipe["plan"]
    plan = Plan.from_json({"name": config.recipe.get("scheme", ""), "rules": rules})
    seen = Seen.from_json(config.recipe["seen"]) if config.recipe.get("seen") else None
    tables = embeddings_in(source.model)  # which former versions left in float, whatever the plan says
    return [
        {
            "path": decision.path,
            "role": decision.role,
            "port": decision.port,
            "grid": None if decision.grid is None else str(decision.grid),
            "reason": decision.reason,
        }
        for decision in plan.resolve(source.having(seen)).values()
        if decision.grid is None or decision.path in config.layers or decision.path not in tables
    ]


def environment() -> dict[str, Any]:
    return {
        "stepquant": __version__,
        "torch": torch.__version__,
        "diffusers": installed("diffusers"),
        "python": platform.python_version(),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
    }


def installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )


def encode(image: Tensor) -> str:
    """An image (3, h, w) in [0, 1] as PNG in base64."""
    pixels = (as_saved(image) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()
