"""Two artifacts side by side: recipes, grids, integers, sizes, and what was measured of them."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor

from stepquant import hub
from stepquant.artifact import LayerSpec
from stepquant.core.pack import unpack_codes
from stepquant.errors import ArtifactError, StepquantError
from stepquant.evaluate.metrics.pairs import psnr
from stepquant.job.pipelines import check_one_denoiser, find_folder, load
from stepquant.job.results import RESULTS, artifact_config, read_results
from stepquant.job.store import weights_bytes
from stepquant.models.denoiser import Denoiser
from stepquant.models.pipelines.index import index_of
from stepquant.report.images import grid, write_image

SAME = ("name", "against", "extractor", "resize")  # without which two numbers do not compare
INSIDE = "artifact"  # of a folder in a run store


@dataclass(frozen=True)
class Side:
    """One artifact: its configuration, its tensors, and what was measured of it."""

    folder: Path
    component: str
    config: hub.StepquantConfig
    tensors: Mapping[str, Tensor]
    results: Mapping[str, Any]

    @classmethod
    def read(cls, folder: Path) -> Side:
        """From the folder of an artifact, or from that of one in a run store."""
        inside = folder / INSIDE
        folder = inside if index_of(inside) is not None else find_folder(str(folder))
        pipeline = load(folder)
        config = artifact_config(pipeline, folder)
        check_one_denoiser(pipeline)
        component = Denoiser.of(pipeline).component
        return cls(folder, component, config, read_tensors(folder / component), measured(folder, config))

    @property
    def name(self) -> str:
        return f"{self.config.recipe.get('method')} {self.config.recipe.get('scheme')}"


def measured(folder: Path, config: hub.StepquantConfig) -> Mapping[str, Any]:
    """Beside the weights, or in the cells of the store that the artifact lies in."""
    own = read_results(folder)
    if own or folder.name != INSIDE:
        return own
    for file in sorted(folder.parents[2].glob(f"cells/*/{RESULTS}")):
        found = read_results(file.parent)
        if found.get("quantized", {}).get("digest") == config.digest[:12]:
            return found
    return {}


def read_tensors(folder: Path) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, "pt") as stored:
                out |= {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 - no mapping
        except (OSError, SafetensorError) as error:
            raise ArtifactError(f"cannot read the weights: {error}", where=str(file)) from error
    return out


def diff(first: Path, second: Path) -> dict[str, Any]:
    """What differs, as plain JSON; lists and tables are empty where nothing does."""
    a, b = Side.read(first), Side.read(second)
    return {
        "a": describe(a),
        "b": describe(b),
        "recipe": recipe_rows(a.config.recipe, b.config.recipe),
        "layers": list(layer_rows(a, b)),
        "products": list(product_rows(a, b)),
        "unchanged": sum(is_same(a, b, path) for path in a.config.layers if path in b.config.layers),
        "quality": quality_rows(a.results, b.results),
        "images": image_numbers(a.results, b.results),
    }


def describe(side: Side) -> dict[str, Any]:
    known = {
        "name": side.name,
        "digest": side.config.digest[:12],
        "bytes": weights_bytes(side.folder, [side.component]),
    }
    return known | {"layers": len(side.config.layers), "measured": bool(side.results)}


def recipe_rows(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Keys of the recipe that differ; settings one by one, rules of the plan left to the layers."""
    left, right = flat(a), flat(b)
    return [
        {"key": key, "a": left.get(key), "b": right.get(key)}
        for key in dict.fromkeys([*left, *right])
        if left.get(key) != right.get(key)
    ]


def flat(recipe: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in recipe.items():
        if isinstance(value, Mapping):
            out |= flat(value, f"{prefix}{key}.")
        elif key != "plan":
            out[f"{prefix}{key}"] = value
    return out


def layer_rows(a: Side, b: Side) -> Iterator[dict[str, Any]]:
    """Layers that differ in a grid, an integer or a range."""
    for path in dict.fromkeys([*a.config.layers, *b.config.layers]):
        if is_same(a, b, path):
            continue
        left, right = a.config.layers.get(path, {}), b.config.layers.get(path, {})
        row: dict[str, Any] = {"path": path}
        for port in ("weight", "input"):
            row[port] = [left.get(port, "float"), right.get(port, "float")]
        row |= integer_change(a, b, path)
        row["weight_scale"] = relative_change(a, b, f"{path}.weight_scale")
        row["input_scale"] = relative_change(a, b, f"{path}.input_scale")
        yield row


def is_same(a: Side, b: Side, path: str) -> bool:
    """Whether both have the layer with the same grids and the same tensors."""
    owners = (path, f"{path}.low_rank")
    names = {name for side in (a, b) for name in side.tensors if name.rpartition(".")[0] in owners}
    return a.config.layers.get(path) == b.config.layers.get(path) and all(
        name in a.tensors and name in b.tensors and torch.equal(a.tensors[name], b.tensors[name])
        for name in names
    )


def integer_change(a: Side, b: Side, path: str) -> dict[str, Any]:
    """The share of weight integers that differ, and the largest difference, where the grids are the same."""
    name, empty = f"{path}.weight", {"changed": None, "largest": None}
    specs = [side.config.layers.get(path) for side in (a, b)]
    if None in specs or specs[0]["weight"] != specs[1]["weight"]:  # type: ignore[index]
        return empty
    if a.tensors[name].shape != b.tensors[name].shape:
        return empty
    bits = LayerSpec.from_json(specs[0]).weight.bits  # type: ignore[arg-type]
    codes = [
        unpack_codes(side.tensors[name], bits, side.tensors[name].numel() * 8 // bits) for side in (a, b)
    ]
    change = (codes[0].int() - codes[1].int()).abs()
    return {"changed": float((change > 0).double().mean()), "largest": int(change.max())}


def relative_change(a: Side, b: Side, name: str) -> float | None:
    """|a - b| / |a| over the whole tensor; None where one has no such tensor."""
    left, right = a.tensors.get(name), b.tensors.get(name)
    if left is None or right is None or left.shape != right.shape:
        return None
    return float((left.double() - right.double()).norm() / left.double().norm().clamp(min=1e-30))


def product_rows(a: Side, b: Side) -> Iterator[dict[str, Any]]:
    """Attention products whose grids or scales differ."""
    for path in dict.fromkeys([*a.config.products, *b.config.products]):
        left, right = a.config.products.get(path, {}), b.config.products.get(path, {})
        for port in dict.fromkeys([*left, *right]):
            change = relative_change(a, b, f"{path}.product.{port}_scale")
            if left.get(port) != right.get(port) or change:
                grids = [left.get(port, "float"), right.get(port, "float")]
                yield {"path": path, "port": port, "grid": grids, "scale": change}


def quality_rows(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Numbers that both have, by the same network; the noise floor is that of the first."""
    found = [
        {tuple(q.get(part) for part in SAME): q for q in side.get("quality", ()) if q["value"] is not None}
        for side in (a, b)
    ]
    return [
        {
            "name": key[0],
            "against": key[1],
            "a": q["value"],
            "b": found[1][key]["value"],
            "floor": q.get("floor"),
            "n": [q["n"], found[1][key]["n"]],
        }
        for key, q in found[0].items()
        if key in found[1]
    ]


def image_numbers(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any] | None:
    """How near the kept images of the same seeds are to each other; None where there are none."""
    shared = shared_images(a, b)
    if shared is None:
        return None
    seeds, _, left, right = shared
    return {"seeds": seeds, "psnr": float(psnr(left, right).mean())}


def shared_images(
    a: Mapping[str, Any], b: Mapping[str, Any]
) -> tuple[list[int], Tensor, Tensor, Tensor] | None:
    """Seeds that both keep, with the images of the float model and of both."""
    kept = [side.get("images") or {"seeds": []} for side in (a, b)]
    seeds = [seed for seed in kept[0]["seeds"] if seed in kept[1]["seeds"]]
    if not seeds:
        return None
    places = [[images["seeds"].index(seed) for seed in seeds] for images in kept]
    sets = ((0, "float"), (0, "quantized"), (1, "quantized"))
    found = [decoded([kept[side][name][place] for place in places[side]]) for side, name in sets]
    return (seeds, *found) if len({images.shape for images in found}) == 1 else None  # type: ignore[return-value]


def decoded(texts: list[str]) -> Tensor:
    arrays = [np.array(Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB")) for text in texts]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 255


def draw(first: Path, second: Path, out: Path) -> None:
    """Three rows of images as one file: float, first, second."""
    a, b = Side.read(first), Side.read(second)
    shared = shared_images(a.results, b.results)
    if shared is None:
        raise StepquantError(
            "there are no images of the same seeds",
            fix="evaluate both with the same --seed, --steps and --images first",
        )
    seeds, *rows = shared
    write_image(grid(torch.cat(rows), columns=len(seeds)), out)


def to_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
