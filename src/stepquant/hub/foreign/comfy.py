"""Layers in files for ComfyUI: markers, integers and scales that belong together, every tensor accounted for."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stepquant.core.bounds import SCALE
from stepquant.hub.foreign.container import FLOATS, Container, Entry
from stepquant.hub.foreign.markers import FP8, INT8, SUFFIX, W4A4, W4A8, Marker, markers_of, refused
from stepquant.hub.foreign.network import ForeignFile, ForeignLayer
from stepquant.hub.foreign.rows import Rows

DTYPES = {INT8: "I8", FP8: "F8_E4M3", W4A4: "I8", W4A8: "I8"}
BESIDE = {
    W4A8: ("weight_s_rel", "weight_s_channel", "weight_codebook")
}  # beside the weight; elsewhere its scales
RELATIVE = ("F8_E4M3", "F32", "U8")  # the last: the bytes of the first
SCALES = ("F32", "F16", "BF16")
LEAVES = ("weight", "comfy_quant", "weight_scale", "input_scale", *BESIDE[W4A8], "weight_correction")
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
        return "" if self.marker.format != FP8 else "fp8 weights become bfloat16"

    @property
    def why_no_product(self) -> str:
        return self.why_float or ("" if self.dynamic else "the file asks for products in float")

    def rows(self, file: Container) -> Rows:
        codes, scales = file.read(f"{self.path}.weight"), self.scales(file)[:, None]
        if self.marker.format == W4A4:  # the first of two in the lower half, each with a sign
            return Rows(4, True, torch.stack([codes << 4 >> 4, codes >> 4], -1).reshape(self.shape), scales)
        return Rows(8, True, codes, scales)

    def scales(self, file: Container, leaf: str = "weight_scale") -> Tensor:
        """One for each row."""
        name = f"{self.path}.{leaf}"
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


@dataclass(frozen=True)
class TableLayer(ComfyLayer):
    """Codes of a table, or of 4 or 6 bits as they are, which a scale for some of them makes bytes with a sign."""

    bits: int

    def rows(self, file: Container) -> Rows:
        relative = self.relative(file)
        values = self.values(file).reshape(*relative.shape, -1) * relative[..., None]
        if not values.isfinite().all():
            name = f"{self.path}.{BESIDE[W4A8][0]}"
            raise refused(
                f"tensor '{name}' or the table beside it is not finite", file, "NaN", "finite numbers"
            )
        codes = values.round().clamp(-127, 127).to(torch.int8).reshape(self.shape)
        return Rows(8, True, codes, self.scales(file, "weight_s_channel")[:, None])

    def values(self, file: Container) -> Tensor:
        """What codes stand for before any scale."""
        packed, half = file.read(f"{self.path}.weight").view(torch.uint8), self.shape[1] // 2
        codes = torch.stack([packed[:, :half] & 15, packed[:, :half] >> 4], -1).reshape(self.shape)
        if self.bits == 6:  # the upper two bits of four codes in a byte
            places = torch.arange(0, 8, 2, dtype=torch.uint8)
            codes = codes | (packed[:, half:, None] >> places & 3).reshape(self.shape) << 4
        table = f"{self.path}.weight_codebook"
        if table not in file.entries:
            return codes.float() - 2 ** (self.bits - 1)
        return file.read(table).float()[codes.long()]

    def relative(self, file: Container) -> Tensor:
        """The scales that rows of codes share in groups."""
        scales = file.read(f"{self.path}.weight_s_rel")
        return (scales.view(torch.float8_e4m3fn) if scales.dtype == torch.uint8 else scales).float()


def read_file(file: Container) -> ForeignFile:
    """Sort the tensors of a file; each one is of a layer, a plain float, or an error."""
    markers = markers_of(file)
    if not markers:
        raise refused(
            "no tensor of this file is marked as quantized",
            file,
            f"{len(file.entries)} tensors without {SUFFIX}",
            f"a file of layers for ComfyUI: {', '.join(DTYPES)}",
        )
    layers = {path: layer_of(file, path, marker) for path, marker in sorted(markers.items())}
    floats = []
    for name, entry in file.entries.items():
        path, _, leaf = name.rpartition(".")
        if name.endswith(IGNORED):
            continue
        if path in layers and leaf in LEAVES:
            own = ("weight", "comfy_quant", *BESIDE.get(layers[path].format, ("weight_scale",)))
            if leaf not in (*own, *(() if layers[path].integer else ("input_scale",))):
                raise refused(
                    f"tensor '{name}' has no place: inputs of {layers[path].format} are quantized as they come"
                    if leaf == "input_scale"
                    else f"tensor '{name}' has no place in {layers[path].format}",
                    file,
                    leaf,
                    ", ".join(own),
                )
            continue
        if entry.dtype not in FLOATS or leaf in LEAVES[2:]:
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
    weight, beside = entry_of(file, path, "weight"), BESIDE.get(marker.format, ("weight_scale",))
    scale = entry_of(file, path, beside[0])
    if weight.dtype != DTYPES[marker.format] or len(weight.shape) != 2 or 0 in weight.shape:
        raise refused(
            f"tensor '{path}.weight' is not what its marker says",
            file,
            f"{weight.dtype} {weight.shape}",
            f"{DTYPES[marker.format]} (outputs, inputs) for {marker.format}",
        )
    outputs, inputs = weight.shape
    if marker.format == W4A8:
        inputs, bits = table_of(file, path, marker)
        made: ComfyLayer = TableLayer(path, (outputs, inputs), marker, True, bits)
    else:
        inputs *= 2 if marker.format == W4A4 else 1
        made = ComfyLayer(
            path, (outputs, inputs), marker, scale.shape in ((outputs, 1), (outputs,)) and outputs > 1
        )
        single = scale.shape in ((), (1,), (1, 1)) and (marker.format != W4A4 or outputs == 1)
        said = marker.per_row is None or marker.per_row == made.by_row or outputs == 1
        if scale.dtype not in SCALES or not (made.by_row or single) or not said:
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
    return made


def entry_of(file: Container, path: str, leaf: str) -> Entry:
    entry = file.entries.get(f"{path}.{leaf}")
    if entry is None:
        raise refused(f"tensor '{path}.{leaf}' is missing", file, f"a marker for '{path}'", "its tensors")
    return entry


def table_of(file: Container, path: str, marker: Marker) -> tuple[int, int]:
    """How many inputs a layer of codes has, and of how many bits these are."""
    weight, relative, scale = (entry_of(file, path, leaf) for leaf in ("weight", *BESIDE[W4A8][:2]))
    table, outputs = file.entries.get(f"{path}.weight_codebook"), weight.shape[0]
    inputs = relative.shape[-1] * marker.share if relative.shape else 0
    bits = next((bits for bits in (4, 6) if 8 * weight.shape[1] == bits * inputs and inputs % 4 == 0), 0)
    fits = (
        relative.dtype in RELATIVE
        and relative.shape == (outputs, inputs // marker.share)
        and scale.dtype in SCALES
        and scale.shape == (outputs,)
        and (table is None or (bits == 4 and table.dtype in SCALES and table.shape == (16,)))
    )
    if not bits or not fits:
        raise refused(
            f"tensor '{path}.{BESIDE[W4A8][0]}' does not fit its layer",
            file,
            [entry.shape for entry in (weight, relative, scale, *(() if table is None else (table,)))],
            f"codes of 4 or 6 bits, a scale for {marker.share} of them, one for each row, and a table of 16 or none",
        )
    return inputs, bits
