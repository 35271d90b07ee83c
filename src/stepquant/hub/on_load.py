"""Float weights that are rounded while diffusers loads them, by schemes whose activations need no calibration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stepquant.artifact import LayerSpec, ProductSpec
from stepquant.core.affine import scale_and_zero, to_groups
from stepquant.core.pack import pack_nearest
from stepquant.core.ranges import minmax
from stepquant.core.rotation import is_group, rotate
from stepquant.errors import ModelError, PlanError
from stepquant.hub.config import StepquantConfig, digests_of, settings_digest
from stepquant.hub.of_diffusers import StepquantQuantizer
from stepquant.models.denoiser import Denoiser, check_finite_weight
from stepquant.models.families.roles import embeddings_in
from stepquant.quant.plan import PORTS, Plan
from stepquant.quant.schemes import SCHEMES, scheme
from stepquant.runtime.lower import prepare, skeleton
from stepquant.runtime.moving import bytes_of, room_for
from stepquant.version import __version__


class OnLoadQuantizer(StepquantQuantizer):
    """Rounds one weight after the other, so that the float network is never all there; then it is as any artifact."""

    requires_calibration = False

    def __init__(self, quantization_config: StepquantConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.pre_quantized = True  # for diffusers: tensors become another shape than they have in their file
        assert quantization_config.scheme is not None
        self.plan = scheme(quantization_config.scheme)

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        self.floats = set(model.state_dict())
        self.specs = specs_of(model, self.plan, self.quantization_config.rotation)
        self.products = products_of(model, self.plan)
        skeleton(model, self.specs, self.products, {})
        self.size = bytes_of(model.state_dict().values())

    def update_missing_keys(self, model: Any, missing_keys: list[str], prefix: str) -> list[str]:
        return [name for name in missing_keys if name in self.floats]

    def maybe_update_state_dict(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        from stepquant.hub.foreign.in_memory import FILE, is_packed  # which few folders have a use for

        if is_packed(state_dict):
            raise ModelError(
                "the layers of this file are packed already, and are not rounded again while they are loaded",
                where=self.where or str(FILE),
                fix=f"quantization_config=StepquantConfig(), or stepquant.load(FILE, scheme='{self.plan.name}')",
            )
        return state_dict

    def create_quantized_param(  # type: ignore[override]
        self,
        model: nn.Module,
        param_value: Tensor,
        param_name: str,
        target_device: torch.device,
        state_dict: dict[str, Tensor],
        unexpected_keys: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """Put the stored tensor in place: rounded, or in fp32."""
        owner, _, leaf = param_name.rpartition(".")
        module, value = model.get_submodule(owner), state_dict[param_name]
        check_finite_weight(param_name, value, self.where)
        for name, tensor in stored_as(leaf, value, self.specs.get(owner)).items():
            with room_for(self.size, target_device):
                there = tensor.to(target_device)
            if name in module._parameters:
                module._parameters[name] = nn.Parameter(there.float(), requires_grad=False)
            else:
                module._buffers[name] = there
        self.loaded.add(param_name)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        missing = sorted(self.floats - self.loaded)
        if missing:
            raise ModelError(
                f"weight '{missing[0]}' is in no file",
                where=self.where,
                got=f"{len(missing)} missing",
                fix="load an intact checkpoint of this class",
            )
        self.follow(model)
        self.quantization_config = StepquantConfig(
            layers={path: spec.to_json() for path, spec in self.specs.items()},
            products={path: spec.to_json() for path, spec in self.products.items()},
            recipe=recipe_of(model, self.plan, self.quantization_config.rotation),
            digests=digests_of(model.state_dict()),
            settings=settings_digest(model.config),
        )
        model.register_to_config(quantization_config=self.quantization_config)
        prepare(model)


def check_scheme(name: str, runtime: Any = None) -> None:
    """It must be one whose activations have no range to measure, and the same at every step."""
    if runtime:
        raise PlanError(
            "a policy of steps needs the t of a sampler, which loading does not see",
            fix=f"stepquant quantize --scheme {name} --policy first=3,last=3 --out FOLDER, then load the folder",
        )
    if scheme(name).measures():
        raise PlanError(
            f"scheme '{name}' needs calibration, which loading does not do",
            expected=", ".join(one for one in SCHEMES if not scheme(one).measures()),
            fix=f"stepquant quantize --scheme {name} --out FOLDER, then load the folder",
        )


def check_rotation(name: str | None, rotation: int | None) -> None:
    """Only rows whose scale is found as they come are rotated."""
    if rotation is None:
        return
    rotates = [one for one in SCHEMES if one.endswith("-dynamic")]
    if name not in rotates:
        raise PlanError(
            "only inputs that are quantized by the token are rotated",
            got=f"rotation={rotation} with scheme {name!r}",
            expected=f"one of {', '.join(rotates)}",
        )
    if type(rotation) is not int or not is_group(rotation):
        raise PlanError(
            "there is no regular Hadamard matrix for this rotation", got=rotation, expected="4, 16, 64 or 256"
        )


def specs_by(name: str, model: nn.Module) -> dict[str, LayerSpec]:
    """What a scheme says of every layer; it must be one that needs no calibration."""
    check_scheme(name)
    return specs_of(model, scheme(name))


def specs_of(model: nn.Module, plan: Plan, rotation: int | None = None) -> dict[str, LayerSpec]:
    """The grids that the plan gives to the layers of a network, whose weights need not be there yet."""
    denoiser = Denoiser(model)
    if denoiser.family.generic:
        raise ModelError(
            f"'{type(model).__name__}' is not among the declared networks: what its layers are for shows in a call",
            fix=f"load it in float, then stepquant.quantize(pipeline, method='minmax', scheme='{plan.name}')",
        )
    found, decided = {}, plan.resolve(denoiser)
    for path in denoiser.sites():
        weight, inputs = decided[path, "weight"].grid, decided[path, "input"].grid
        if weight is not None:
            if weight.codebook:
                raise PlanError(
                    f"'{path}:weight' has a codebook, which is not made while weights are loaded",
                    fix=f"load the model in float, then quantize it with plan '{plan.name}'",
                )
            layer: Any = model.get_submodule(path)
            turns = rotation and inputs and isinstance(layer, nn.Linear) and not layer.in_features % rotation
            found[path] = LayerSpec(weight, inputs, rotation=rotation if turns and rotation else 0)
    tables = {path: decided[path, "weight"].grid for path in embeddings_in(model)}
    return found | {path: LayerSpec(grid) for path, grid in tables.items() if grid is not None}


def products_of(model: nn.Module, plan: Plan) -> dict[str, ProductSpec]:
    """The grids that the plan gives to the operands of attention."""
    denoiser = Denoiser(model)
    decided = plan.resolve(denoiser)
    found = {
        path: {port: decided[path, port].grid for port in PORTS["product"]} for path in denoiser.products()
    }
    return {path: ProductSpec(**grids) for path, grids in found.items() if all(grids.values())}  # type: ignore[arg-type]


def stored_as(leaf: str, value: Tensor, spec: LayerSpec | None) -> dict[str, Tensor]:
    """What becomes of a tensor of a layer, by the names that the artifact has for it."""
    if spec is None:
        return {leaf: value}
    return rounded(value, spec) if leaf == "weight" else {leaf: value.float()}


def rounded(weight: Tensor, spec: LayerSpec) -> dict[str, Tensor]:
    """Integers to the nearest over the whole range of each row of scales."""
    grid = spec.weight
    rows = to_groups(rotate(weight, spec.rotation) if spec.rotation else weight.float(), grid)
    scale, zero_point = scale_and_zero(*minmax(rows, grid), grid)
    made = {
        "weight": pack_nearest(rows, scale, zero_point, grid),
        "weight_scale": scale,
    }
    return made if grid.symmetric else made | {"weight_zero_point": zero_point.to(torch.int16)}


def recipe_of(model: Any, plan: Plan, rotation: int | None = None) -> dict[str, Any]:
    """How the artifact came about."""
    name = str(model.config.get("_name_or_path") or type(model).__name__)
    return {
        "model": Path(name).resolve().name if Path(name).is_dir() else name,
        "method": "minmax",
        "scheme": plan.name,
        **({} if rotation is None else {"rotation": rotation}),
        "plan": plan.to_json()["rules"],
        "versions": {"stepquant": __version__, "torch": str(torch.__version__)},
    }
