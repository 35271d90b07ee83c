"""Quantize a model that need not fit into memory: its weights pass from file to file, one tensor at a time."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights
from diffusers import ModelMixin
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor

from stepquant import hub
from stepquant.artifact import Artifact
from stepquant.core.digest import add_tensor
from stepquant.errors import ModelError, PlanError, StepquantError
from stepquant.hub.config import StepquantConfig, digests_of, settings_digest
from stepquant.hub.on_load import specs_of, stored_as
from stepquant.job.recipe import Recipe
from stepquant.job.tensors import FILE, Place, Writer, weights_in
from stepquant.models.denoiser import Denoiser, check_finite_weight, denoisers
from stepquant.progress import Progress
from stepquant.quant.schemes import SCHEMES, scheme
from stepquant.runtime.lower import skeleton

SHARD = "10GB"  # as diffusers cuts them
PATTERN = FILE.replace(".", "{suffix}.")
# Of the other components: files that are never loaded here, or are the same weights once more.
NOT_COPIED = ("*.bin", "*.ckpt", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.onnx*", "*.fp16.*")
METHOD = "minmax"


def check_passes(recipe: Recipe) -> None:
    """Nothing of the recipe may need the network as a whole."""
    if recipe.method != METHOD or recipe.settings.get("bias"):
        raise StepquantError(
            "weights that pass through one by one are rounded to the nearest, and nothing is fitted",
            got=f"--method {recipe.method}" + (" with bias" if recipe.settings.get("bias") else ""),
            expected=f"--method {METHOD}",
            fix=f"add --method {METHOD}, or leave out --low-memory",
        )
    if recipe.policy is not None:
        raise StepquantError(
            "a policy of steps needs the t of a trajectory, which a model that is never all there cannot run",
            got=f"--policy {recipe.policy}",
            fix="leave out --policy, or --low-memory",
        )
    if recipe.budget is not None or recipe.build_plan().measures():
        raise PlanError(
            f"scheme '{recipe.scheme or recipe.build_plan().name}' needs calls of the network, which is never all there",
            expected=", ".join(name for name in SCHEMES if not scheme(name).measures()),
            fix="choose one of these, or leave out --low-memory",
        )


def networks_in(folder: Path) -> dict[str, Any]:
    """The denoisers of a pipeline's folder, without their weights."""
    index, found = read_index(folder), {}
    for name, entry in index.items():
        kind = getattr(diffusers, str(entry[1]), None) if isinstance(entry, list) else None
        if isinstance(kind, type) and issubclass(kind, ModelMixin):
            with init_empty_weights():
                found[name] = kind.from_config(kind.load_config(folder / name)).eval()
    chosen = denoisers(SimpleNamespace(**found))
    if not chosen:
        raise ModelError(
            "the pipeline has no denoiser that diffusers knows",
            where=str(folder),
            fix="leave out --low-memory",
        )
    return chosen


def read_index(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    return found


def passings_of(recipe: Recipe, source: Path) -> list[Passing]:
    """One for every denoiser of a pipeline's folder."""
    check_passes(recipe)
    hub.check_folder(source)
    sampler, networks = read_index(source)["scheduler"][1], networks_in(source)
    beside = [one for one in recipe.components if one not in networks]
    if beside:
        raise StepquantError(
            f"'{beside[0]}' is measured in calls of the pipeline, which is never all there",
            fix="leave out --components, or --low-memory",
        )
    return [Passing(recipe, name, model, source / name, sampler) for name, model in networks.items()]


def quantize_files(
    passings: Sequence[Passing], source: Path, out: Path, name: str, progress: Progress
) -> list[dict[str, Any]]:
    """Fill `out` with the artifact of a pipeline's folder, which is to be called `name`; the provenance of each denoiser."""
    index, made = read_index(source), {}
    for one in passings:
        one.model.register_to_config(_name_or_path=name)
        made[one.component] = one.run(out / one.component, progress)
    for component, entry in index.items():
        if isinstance(entry, list) and component not in made and (source / component).is_dir():
            copy_part(source / component, out / component)
    index["_name_or_path"] = name
    (out / "model_index.json").write_text(
        json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8"
    )
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
        self.specs = specs_of(model, recipe.build_plan())
        self.floats: dict[str, Tensor] = model.state_dict()
        self.places = weights_in(source)
        check_places(self.places, self.floats, source)

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
        skeleton(self.model, self.specs, {}, {})
        digests = self.write(self.model.state_dict(), out, total, progress)
        made = self.provenance(total)
        settings = settings_digest(self.model.config)
        config = StepquantConfig(
            **Artifact(self.specs, {}, {}, recipe=made).to_json(), digests=digests, settings=settings
        )
        self.model.register_to_config(quantization_config=config, _pre_quantization_dtype=torch.float32)
        self.model.save_config(out)
        return made

    def write(
        self, stored: Mapping[str, Tensor], out: Path, total: hashlib._Hash, progress: Progress
    ) -> dict[str, str]:
        """One weight after the other; the digest of every stored tensor."""
        like = {name: value.to("meta") for name, value in stored.items()}
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
                    digests |= digests_of({path: tensor})
                    writers[cut.tensor_to_filename[path]].put(path, tensor)
        if cut.is_sharded:
            index = {"metadata": cut.metadata, "weight_map": cut.tensor_to_filename}
            text = json.dumps(index, indent=2, sort_keys=True) + "\n"
            (out / f"{FILE}.index.json").write_text(text, encoding="utf-8")
        return {name: digests[name] for name in stored}


def check_places(places: Mapping[str, Place], floats: Mapping[str, Tensor], where: Path) -> None:
    """Every tensor of the network is in the files, in its shape."""
    for name, value in floats.items():
        if name not in places or places[name].shape != value.shape:
            raise ModelError(
                f"weight '{name}' is in no file in its shape",
                where=str(where),
                got=places[name].shape if name in places else None,
                expected=tuple(value.shape),
                fix="load the model with diffusers and save it again, or leave out --low-memory",
            )
