"""Layers in files for ComfyUI: markers, integers and scales that belong together, every tensor accounted for."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stepquant.core.bounds import SCALE
from stepquant.hub.foreign.container import FLOATS, Container
from stepquant.hub.foreign.markers import FP8, INT8, SUFFIX, Marker, markers_of, refused
from stepquant.hub.foreign.network import ForeignFile, ForeignLayer
from stepquant.hub.foreign.rows import Rows

DTYPES = {INT8: "I8", FP8: "F8_E4M3"}
SCALES = ("F32", "F16", "BF16")
IGNORED = ".comfy_attention.config"  # how ComfyUI multiplies attention, which says nothing of weights


@dataclass(frozen=True)
class ComfyLayer(ForeignLayer):
    """A linear, and what its marker says."""

    marker: Marker
    by_row: bool  # whether every row of the weight has a scale of its own

    @property
    def format(self) -> str:
        return self.marker.format

    @property
    def rotation(self) -> int:
        return self.marker.rotation

    @property
    def dynamic(self) -> bool:
        return not self.marker.float_product

    @property
    def may_be_float(self) -> bool:
        return False

    @property
    def shared(self) -> str:
        return "row" if self.by_row else "tensor"

    @property
    def why_float(self) -> str:
        return "" if self.marker.format == INT8 else "fp8 weights become bfloat16"

    @property
    def why_no_product(self) -> str:
        return self.why_float or ("" if self.dynamic else "the file asks for products in float")

    def rows(self, file: Container) -> Rows:
        return Rows(8, True, file.read(f"{self.path}.weight"), self.scales(file)[:, None])

    def scales(self, file: Container) -> Tensor:
        """One for each row."""
        name = f"{self.path}.weight_scale"
        scales = file.read(name).float().reshape(-1)
        least, most = scales.aminmax()
        if not (least >= SCALE.low and most <= SCALE.high):  # so that NaN fails
            raise refused(
                f"tensor '{name}' holds values that cannot be", file, f"{least} to {most}", SCALE.words
            )
        return scales.expand(self.shape[0])

    def floats(self, file: Container) -> Tensor:
        """What an fp8 weight stands for, in the dtype that such networks compute in."""
        values = file.read(f"{self.path}.weight").float() * self.scales(file)[:, None]
        if not values.isfinite().all():
            raise refused(f"tensor '{self.path}.weight' is not finite", file, "NaN", "finite numbers")
        return values.to(torch.bfloat16)


def read_file(file: Container) -> ForeignFile:
    """Sort the tensors of a file; each one is of a layer, a plain float, or an error."""
    markers = markers_of(file)
    if not markers:
        raise refused(
            "no tensor of this file is marked as quantized",
            file,
            f"{len(file.entries)} tensors without {SUFFIX}",
            "a file of int8_tensorwise or float8_e4m3fn layers for ComfyUI",
        )
    layers = {path: layer_of(file, path, marker) for path, marker in sorted(markers.items())}
    floats = []
    for name, entry in file.entries.items():
        path, _, leaf = name.rpartition(".")
        own = ("weight", "weight_scale", "comfy_quant")
        if (path in layers and leaf in (*own, "input_scale")) or name.endswith(IGNORED):
            if leaf == "input_scale" and layers[path].integer:
                raise refused(
                    f"tensor '{name}' has no place: inputs of {INT8} are quantized as they come",
                    file,
                    leaf,
                    ", ".join(own),
                )
            continue
        if entry.dtype not in FLOATS or leaf in ("weight_scale", "input_scale"):
            raise refused(
                f"tensor '{name}' has no marker that says what it is",
                file,
                f"{entry.dtype} {entry.shape}",
                f"a float, or a layer with {path}{SUFFIX}",
            )
        floats.append(name)
    dialects = sorted({marker.dialect for marker in markers.values()})
    return ForeignFile(file, layers, tuple(floats), " and ".join(dialects))


def layer_of(file: Container, path: str, marker: Marker) -> ComfyLayer:
    """What the header says of the layer's tensors fits its marker."""
    weight, scale = (file.entries.get(f"{path}.{leaf}") for leaf in ("weight", "weight_scale"))
    for leaf, entry in (("weight", weight), ("weight_scale", scale)):
        if entry is None:
            raise refused(f"tensor '{path}.{leaf}' is missing", file, f"a marker for '{path}'", "its tensors")
    assert weight is not None
    assert scale is not None
    if weight.dtype != DTYPES[marker.format] or len(weight.shape) != 2 or 0 in weight.shape:
        raise refused(
            f"tensor '{path}.weight' is not what its marker says",
            file,
            f"{weight.dtype} {weight.shape}",
            f"{DTYPES[marker.format]} (outputs, inputs) for {marker.format}",
        )
    outputs, inputs = weight.shape
    by_row = scale.shape in ((outputs, 1), (outputs,)) and outputs > 1
    single = scale.shape in ((), (1,), (1, 1))
    said = marker.per_row is None or marker.per_row == by_row or outputs == 1
    if scale.dtype not in SCALES or not (by_row or single) or not said:
        raise refused(
            f"tensor '{path}.weight_scale' is no scale of its layer",
            file,
            f"{scale.dtype} {scale.shape}",
            "one for each row" if marker.per_row else f"F32 ({outputs}, 1), or a single one",
        )
    if marker.rotation and inputs % marker.rotation:
        raise refused(
            f"tensor '{path}.weight' is said to be rotated in groups that do not fill its rows",
            file,
            f"groups of {marker.rotation} in {inputs} inputs",
            "a group that divides them",
        )
    return ComfyLayer(path, (outputs, inputs), marker, by_row)
