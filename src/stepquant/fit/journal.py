"""Journal: what has been learnt so far, one file per block, so that a killed run goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from stepquant.calib.cache import atomically
from stepquant.calib.calibset import CalibSet
from stepquant.core.digest import value_digest
from stepquant.core.low_rank import LowRank
from stepquant.errors import CalibrationError
from stepquant.fit.learnable import FixedIntegers, FixedRounding, kept
from stepquant.fit.learner import activation_quantizers, inside
from stepquant.fit.reconstruct import Report
from stepquant.quant.insert import Inserted
from stepquant.quant.layers import QuantLayer

FORMAT = 3  # raised when the same settings come to mean another result


class Journal:
    """Files under a name made of everything that decides the result: other settings are another journal."""

    def __init__(self, cache: Path, network: Inserted, data: CalibSet, settings: Mapping[str, Any]) -> None:
        key = {
            "format": FORMAT,
            "model": network.denoiser.digest(),
            "plan": network.plan.to_json(),
            "splits": {path: list(widths) for path, widths in network.splits.items()},
            "data": [[shard.parent.name, shard.name] for shard in data.shards],
            "records": [data.index, data.weights],
            "settings": dict(settings),
        }
        if network.plan.float_steps is not None:
            key["float_steps"] = network.plan.float_steps.to_json()
        self.network = network
        self.folder = cache / "journal" / value_digest(key)[:32]

    def file(self, stage: str, path: str) -> Path:
        return self.folder / stage / f"{path or 'model'}.safetensors"

    def write(self, stage: str, report: Report) -> None:
        """Keep the roundings and ranges of a finished block."""
        tensors = {}
        for name, layer in inside(self.network.layers, report.path).items():
            if isinstance(layer.rounding, FixedRounding):
                tensors[f"up|{name}"] = layer.rounding.up.contiguous()
            if isinstance(layer.rounding, FixedIntegers):
                tensors[f"integers|{name}"] = layer.rounding.given.contiguous()
                assert layer.weight_quantizer is not None
                tensors[f"scale|{name}"] = torch.stack(layer.weight_quantizer.range())
            if layer.correction is not None:
                tensors[f"shift|{name}"] = layer.correction.contiguous()
            tensors |= division_of(layer, name)
        for name, product in inside(self.network.products, report.path).items():
            if product.correction is not None:
                tensors[f"shift|{name}.product"] = product.correction.contiguous()
        for quantizer in activation_quantizers(self.network, report.path):
            if quantizer.is_set:
                tensors[f"range|{quantizer.site}"] = torch.stack(quantizer.range())
        tensors = {name: value.cpu() for name, value in tensors.items()}
        note = {"report": json.dumps(vars(report))}
        atomically(
            self.file(stage, report.path), lambda temporary: save_file(tensors, temporary, metadata=note)
        )

    def read(self, stage: str, path: str) -> Report | None:
        """Put the roundings and ranges of a block back, where it was finished before."""
        file = self.file(stage, path)
        if not file.exists():
            return None
        try:
            with safe_open(file, "pt") as stored:
                report = Report(**json.loads(stored.metadata()["report"]))
                device = self.network.denoiser.device
                tensors = {name: stored.get_tensor(name).to(device) for name in stored.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise CalibrationError(
                f"the journal of an earlier run is damaged: {error}",
                where=str(file),
                fix="delete this file and run again",
            ) from error
        for name, layer in inside(self.network.layers, path).items():
            divide_again(layer, name, tensors)
            if f"scale|{name}" in tensors and layer.weight_quantizer is not None:
                layer.weight_quantizer.set_range(*tensors[f"scale|{name}"])
            rounding = stored_rounding(tensors, name)
            layer.rounding = None if rounding is None else kept(rounding, layer)
            layer.correction = tensors.get(f"shift|{name}")
        for name, product in inside(self.network.products, path).items():
            product.correction = tensors.get(f"shift|{name}.product")
        for quantizer in activation_quantizers(self.network, path):
            if f"range|{quantizer.site}" in tensors:
                quantizer.set_range(*tensors[f"range|{quantizer.site}"])
        return report


def division_of(layer: QuantLayer, name: str) -> dict[str, Tensor]:
    """What lies beside the integers of a layer, and the range of its weight, which is another for it."""
    found = {} if layer.factors is None else {f"factors|{name}": layer.factors}
    if layer.branch is not None:
        found |= {f"down|{name}": layer.branch.down, f"up_rank|{name}": layer.branch.up}
    if found and layer.weight_quantizer is not None:
        found[f"weight|{name}"] = torch.stack(layer.weight_quantizer.range())
    return {key: value.contiguous() for key, value in found.items()}


def divide_again(layer: QuantLayer, name: str, tensors: Mapping[str, Tensor]) -> None:
    """Divide a layer as it was, unless an earlier stage has done it already."""
    if f"weight|{name}" not in tensors or layer.factors is not None or layer.branch is not None:
        return
    sides = f"down|{name}", f"up_rank|{name}"
    branch = LowRank(tensors[sides[0]], tensors[sides[1]]) if sides[0] in tensors else None
    layer.divide(tensors.get(f"factors|{name}"), branch)
    assert layer.weight_quantizer is not None
    layer.weight_quantizer.set_range(*tensors[f"weight|{name}"])


def stored_rounding(tensors: Mapping[str, Tensor], name: str) -> FixedRounding | FixedIntegers | None:
    if f"up|{name}" in tensors:
        return FixedRounding(tensors[f"up|{name}"])
    return FixedIntegers(tensors[f"integers|{name}"]) if f"integers|{name}" in tensors else None
