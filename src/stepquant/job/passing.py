"""Quantize a model that need not fit into memory: its weights pass from file to file, one tensor at a time."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor

from stepquant import hub
from stepquant.artifact import Artifact
from stepquant.core.digest import add_tensor
from stepquant.errors import ModelError
from stepquant.hub.config import StepquantConfig, digests_of, settings_digest
from stepquant.hub.on_load import products_of, specs_of, stored_as
from stepquant.job.in_files import check_places, networks_in
from stepquant.job.recipe import Recipe
from stepquant.job.tensors import FILE, Writer, narrow_tables, weights_in
from stepquant.methods.method import UnbiasedMethod
from stepquant.models.denoiser import Denoiser, check_finite_weight
from stepquant.models.pipelines.index import index_of, read_index
from stepquant.models.pipelines.modular import write_index
from stepquant.progress import Progress
from stepquant.runtime.lower import skeleton

SHARD = "10GB"  # as diffusers cuts them
PATTERN = FILE.replace(".", "{suffix}.")
# Of the other components: files that are never loaded here, or are the same weights once more.
NOT_COPIED = ("*.bin", "*.ckpt", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.onnx*", "*.fp16.*")
METHOD = "minmax"


def passes(recipe: Recipe) -> bool:
    """Whether nothing of the recipe needs a call of the network."""
    method = recipe.build_method()
    corrected = isinstance(method, UnbiasedMethod) and method.corrected
    fitted = recipe.method != METHOD or corrected or recipe.policy is not None
    measured = recipe.budget is not None or recipe.build_plan().measures()
    return not (fitted or measured or recipe.components)


def passings_of(recipe: Recipe, source: Path) -> list[Passing]:
    """One for every denoiser of a pipeline's folder."""
    hub.check_folder(source)
    sampler, networks = read_index(source)["scheduler"][1], networks_in(source)
    return [Passing(recipe, name, model, source / name, sampler) for name, model in networks.items()]


def quantize_files(
    passings: Sequence[Passing], source: Path, out: Path, called: str, name: str, progress: Progress
) -> list[dict[str, Any]]:
    """Fill `out`, to be `called` so, with the artifact of a folder that goes by `name`; the provenance of each denoiser."""
    file, index, made = index_of(source), read_index(source), {}
    assert file is not None
    for one in passings:
        one.model.register_to_config(_name_or_path=name)
        made[one.component] = one.run(out / one.component, progress)
    for component, entry in index.items():
        if isinstance(entry, list) and component not in made and (source / component).is_dir():
            copy_part(source / component, out / component)
    index["_name_or_path"] = name
    write_index(index, out / file.name, called)
    return list(made.values())


def copy_part(source: Path, out: Path) -> None:
    """A component as it is, without pickled weights."""
    if any(source.glob("*.bin")) and not any(source.glob("*.safetensors")):
        raise ModelError(
            "pickled weights (.bin) are never loaded",
            where=str(source),
            expected="weights as safetensors",
            fix="load them with diffusers where you trust them, and save_pretrained again",
        )
    shutil.copytree(source, out, ignore=shutil.ignore_patterns(*NOT_COPIED))


class Passing:
    """The way of one network's weights from its files into those of the artifact."""

    def __init__(self, recipe: Recipe, component: str, model: Any, source: Path, sampler: str) -> None:
        self.recipe, self.component, self.model, self.sampler = recipe, component, model, sampler
        self.denoiser = Denoiser(model, component=component)
        plan = recipe.build_plan()
        self.specs, self.products = specs_of(model, plan), products_of(model, plan)
        self.floats: dict[str, Tensor] = model.state_dict()
        self.places = weights_in(source)
        check_places(self.places, self.floats, source)
        self.narrow = narrow_tables(model, self.places)

    def values(self, total: hashlib._Hash, progress: Progress) -> Iterator[tuple[str, Tensor]]:
        """The float weights one after the other, which are added to a digest."""
        names = sorted(self.floats)
        for name in progress.track(names, f"weights of {self.component}", len(names)):
            value = self.places[name].read().to(self.floats[name].dtype)
            check_finite_weight(name, value, type(self.model).__name__)
            add_tensor(total, name, value)
            yield name, value

    def provenance(self, total: hashlib._Hash) -> dict[str, Any]:
        return self.recipe.provenance_of(self.sampler, self.denoiser.digest_of(total.hexdigest()))

    def wanted(self, progress: Progress) -> dict[str, Any]:
        """The provenance, where nothing is written."""
        total = hashlib.sha256()
        for _ in self.values(total, progress):
            pass
        return self.provenance(total)

    def run(self, out: Path, progress: Progress) -> dict[str, Any]:
        """Write the network into a folder; returns the provenance."""
        total = hashlib.sha256()
        out.mkdir(parents=True)
        skeleton(self.model, self.specs, self.products, {})
        digests = self.write(self.model.state_dict(), out, total, progress)
        made = self.provenance(total)
        settings = settings_digest(self.model.config)
        config = StepquantConfig(
            **Artifact(self.specs, self.products, {}, recipe=made).to_json(),
            digests=digests,
            settings=settings,
        )
        self.model.register_to_config(quantization_config=config, _pre_quantization_dtype=torch.float32)
        self.model.save_config(out)
        return made

    def write(
        self, stored: Mapping[str, Tensor], out: Path, total: hashlib._Hash, progress: Progress
    ) -> dict[str, str]:
        """One weight after the other; the digest of every stored tensor."""
        like = {name: value.to("meta", self.narrow.get(name)) for name, value in stored.items()}
        cut = split_torch_state_dict_into_shards(like, max_shard_size=SHARD, filename_pattern=PATTERN)
        digests: dict[str, str] = {}
        with ExitStack() as files:
            writers = {
                file: files.enter_context(Writer(out / file, {name: like[name] for name in some}))
                for file, some in cut.filename_to_tensors.items()
            }
            for name, value in self.values(total, progress):
                owner, _, leaf = name.rpartition(".")
                for part, tensor in stored_as(leaf, value, self.specs.get(owner)).items():
                    path = f"{owner}.{part}" if owner else part
                    kept = tensor.to(like[path].dtype)
                    digests |= digests_of({path: kept})
                    writers[cut.tensor_to_filename[path]].put(path, kept)
        if cut.is_sharded:
            index = {"metadata": cut.metadata, "weight_map": cut.tensor_to_filename}
            text = json.dumps(index, indent=2, sort_keys=True) + "\n"
            (out / f"{FILE}.index.json").write_text(text, encoding="utf-8")
        return {name: digests[name] for name in stored}
