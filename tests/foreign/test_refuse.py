"""What cannot be trusted in a file is one error that names the tensor; nothing is written then."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from stepquant.errors import ArtifactError, ModelError, StepquantError
from stepquant.hub.foreign.comfy import read_file
from stepquant.hub.foreign.container import open_file
from stepquant.job.foreign import convert, inspect_file
from tests.foreign.test_convert import folder_of, rotated, tiny, written
from tests.foreign.writer import File, fast, file_of, int8, w4a4, w4a8

A, B = "block.a", "block.b"


def small() -> File:
    torch.manual_seed(0)
    return file_of(
        {f"{A}.bias": torch.zeros(8), "norm.weight": torch.ones(3)},
        {A: int8(torch.randn(8, 32), 16), B: int8(torch.randn(8, 32))},
    )


def says(**said: object) -> Callable[[File], None]:
    return lambda file: file.mark(A, said)


def becomes(name: str, value: torch.Tensor) -> Callable[[File], None]:
    return lambda file: file.tensors.update({name: value})


def without(name: str) -> Callable[[File], None]:
    return lambda file: [file.tensors.pop(name)].clear()


def in_table(entry: object) -> Callable[[File], None]:
    return lambda file: file.metadata.update({"_quantization_metadata": json.dumps(entry)})


INT8 = {"format": "int8_tensorwise"}
BAD: dict[str, tuple[Callable[[File], None], str]] = {
    "a long marker": (
        lambda file: file.mark(A, INT8 | {"x": "y" * 70000}),
        "'block.a.comfy_quant' is too long",
    ),
    "a marker of floats": (becomes(f"{A}.comfy_quant", torch.ones(9)), "'block.a.comfy_quant' is no text"),
    "no JSON": (lambda file: file.mark(A, b"\xff{"), "'block.a.comfy_quant' is no JSON"),
    "nested JSON": (lambda file: file.mark(A, b"[" * 60000), "'block.a.comfy_quant' is no JSON"),
    "no object": (lambda file: file.mark(A, b"[1]"), "'block.a.comfy_quant' is no object"),
    "an unknown format": (says(format="nvfp4"), "'block.a.comfy_quant' names a format that is not read"),
    "a format of another kind": (says(format=["int8_tensorwise"]), "names a format that is not read"),
    "no format at all": (says(convrot=True), "'block.a.comfy_quant' names no format"),
    "an unknown word": (says(**INT8, asymmetric=True), "'block.a.comfy_quant' says what is not known here"),
    "params that are none": (says(**INT8, params=3), "says what is not known here"),
    "an unknown word in params": (says(**INT8, params={"block": 3}), "says what is not known here"),
    "a group without its flag": (says(**INT8, convrot_groupsize=16), "a group of rotation without saying"),
    "a flag that says no": (
        says(**INT8, convrot=False, convrot_groupsize=16),
        "a group of rotation without saying",
    ),
    "a flag that is no truth": (says(**INT8, convrot=1, convrot_groupsize=16), "'convrot' of marker"),
    "no power of four": (says(**INT8, convrot=True, convrot_groupsize=8), "rotates by what is no group"),
    "a group of one": (says(**INT8, convrot=True, convrot_groupsize=1), "rotates by what is no group"),
    "a group of text": (says(**INT8, convrot=True, convrot_groupsize="16"), "rotates by what is no group"),
    "a group that does not fill": (
        says(**INT8, convrot=True, convrot_groupsize=64),
        "'block.a.weight' is said to be",
    ),
    "two dialects": (says(convrot=True, convrot_groupsize=16, per_row=True), "written in another dialect"),
    "two descriptions": (
        in_table({"format_version": "1.0", "layers": {A: INT8}}),
        "layer 'block.a' is described twice",
    ),
    "a foreign table": (in_table({"layers": {}}), "'_quantization_metadata' cannot be read"),
    "a table without format": (
        in_table({"format_version": "1.0", "layers": {"c": {"per_row": True}}}),
        r"'_quantization_metadata.layers.c' names no format",
    ),
    "a table of nothing there": (
        in_table({"format_version": "1.0", "layers": {"c": INT8}}),
        "'c.weight' is missing",
    ),
    "a float weight": (
        becomes(f"{A}.weight", torch.ones(8, 32)),
        "'block.a.weight' is not what its marker says",
    ),
    "bytes without sign": (
        becomes(f"{A}.weight", torch.ones(8, 32, dtype=torch.uint8)),
        "'block.a.weight' is not what its marker says",
    ),
    "a weight of a convolution": (
        becomes(f"{A}.weight", torch.ones(8, 4, 3, 3, dtype=torch.int8)),
        "'block.a.weight' is not what its marker says",
    ),
    "no scales": (without(f"{A}.weight_scale"), "'block.a.weight_scale' is missing"),
    "no weight": (without(f"{A}.weight"), "'block.a.weight' is missing"),
    "no marker": (
        without(f"{A}.comfy_quant"),
        "'block.a.weight' has no marker|'block.a.weight_scale' has no marker",
    ),
    "scales too few": (becomes(f"{A}.weight_scale", torch.ones(7, 1)), "'block.a.weight_scale' is no scale"),
    "scales of integers": (
        becomes(f"{A}.weight_scale", torch.ones(8, 1, dtype=torch.int32)),
        "'block.a.weight_scale' is no scale",
    ),
    "a scale of an input": (
        becomes(f"{A}.input_scale", torch.ones(())),
        "'block.a.input_scale' has no place",
    ),
    "a scale of nothing": (becomes("c.weight_scale", torch.ones(())), "'c.weight_scale' has no marker"),
    "integers of nothing": (becomes("c", torch.ones(3, dtype=torch.int64)), "'c' has no marker"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_file_is_one_error(kind: str, tmp_path: Path) -> None:
    change, words = BAD[kind]
    file = small()
    read_file(open_file(file.write(tmp_path / "good.safetensors")))
    change(file)
    with pytest.raises(ArtifactError, match=words) as told:
        read_file(open_file(file.write(tmp_path / "bad.safetensors")))
    assert str(tmp_path / "bad.safetensors") in str(told.value)
    assert len(str(told.value)) < 1000


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_scales_that_cannot_be(value: float, tmp_path: Path) -> None:
    file = small()
    file.tensors[f"{A}.weight_scale"][3] = value
    found = read_file(open_file(file.write(tmp_path / "bad.safetensors")))
    with pytest.raises(ArtifactError, match="'block.a.weight_scale' holds values"):
        found.layers[A].scales(found.file)


def test_what_others_accept_too(tmp_path: Path) -> None:
    file = small()
    file.mark(A, INT8 | {"params": {"convrot": True, "convrot_groupsize": 16}})
    file.mark(B, INT8 | {"full_precision_matrix_mult": False, "convrot": False})
    file.tensors[f"{B}.weight_scale"] = file.tensors[f"{B}.weight_scale"].flatten()
    file.tensors["attention.comfy_attention.config"] = torch.ones(3, dtype=torch.uint8)
    found = read_file(open_file(file.write(tmp_path / "some.safetensors")))
    assert found.layers[A].marker.rotation == 16
    assert found.layers[B].by_row
    assert found.floats == ("block.a.bias", "norm.weight")


@pytest.mark.parametrize(
    ("cut", "words"),
    [(lambda data: data[:-100], "no intact safetensors"), (lambda data: data[:30], "no intact safetensors"),
     (lambda data: b"", "no intact safetensors"), (lambda data: b"\xff" * 100, "no intact safetensors")],
)  # fmt: skip
def test_files_that_are_cut_off(cut: Callable[[bytes], bytes], words: str, tmp_path: Path) -> None:
    path = small().write(tmp_path / "some.safetensors")
    path.write_bytes(cut(path.read_bytes()))
    with pytest.raises(ArtifactError, match=words):
        inspect_file(path)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="there is no file"):
        inspect_file(tmp_path / "some.safetensors")
    (tmp_path / "some.ckpt").write_bytes(b"pickled")
    with pytest.raises(ArtifactError, match="only safetensors"):
        inspect_file(tmp_path / "some.ckpt")
    plain = File({"a.weight": torch.ones(3)}).write(tmp_path / "plain.safetensors")
    with pytest.raises(ArtifactError, match="no tensor of this file is marked"):
        inspect_file(plain)


def test_a_network_of_another_shape_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    model, _ = tiny("flux")
    config = folder_of(model, tmp_path)
    file, _ = written(model, None, rotated)
    out = tmp_path / "out"

    def refusal(change: Callable[[File], None], kind: type[StepquantError] = ArtifactError) -> str:
        again = File(dict(file.tensors))
        change(again)
        with pytest.raises(kind) as told:
            convert(again.write(tmp_path / "bad.safetensors"), out, config=config)
        assert not out.exists()
        return str(told.value)

    assert "'x_embedder.bias' is missing" in refusal(without("x_embedder.bias"))
    more = refusal(becomes("more.weight", torch.ones(3)))
    assert "'more.weight' is foreign" in more
    assert "got: 0 missing, 1 extra\n" in more  # and nothing of a converter that knew none of the names
    assert "'x_embedder.bias' does not fit" in refusal(becomes("x_embedder.bias", torch.ones(3)))
    name = "norm_out.linear"
    narrow = file_of({}, {name: int8(torch.randn(64, 16))}).tensors
    assert f"'{name}.weight' does not fit" in refusal(lambda again: again.tensors.update(narrow))
    assert "finite numbers" in refusal(becomes("x_embedder.bias", torch.full((32,), torch.nan)))


def test_configurations_that_name_no_network(tmp_path: Path) -> None:
    model, _ = tiny("flux")
    source = written(model, None, int8)[0].write(tmp_path / "some.safetensors")
    for text, words in (
        (None, "does not say what the network is"),
        ("{", "does not say what the network is"),
        ("[]", "names no network"),
        ('{"_class_name": "os"}', "names no network"),
        ('{"_class_name": "DDIMScheduler"}', "names no network"),
        ('{"_class_name": "FluxTransformer2DModel", "quantization_config": {}}', "quantized already"),
    ):
        config = tmp_path / "config.json"
        if text is not None:
            config.write_text(text)
        with pytest.raises(ModelError, match=words):
            convert(source, tmp_path / "out", config=config)


def test_a_folder_that_is_there_stays(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(StepquantError, match="is there already"):
        convert(tmp_path / "some.safetensors", tmp_path / "out", config=tmp_path)


W4A8 = {"format": "asym_w4a8_int8", "convrot_groupsize": 16}
WORSE: dict[str, tuple[Callable[[File], None], str]] = {
    "a weight that is not packed": (becomes(f"{A}.weight", torch.ones(8, 32, dtype=torch.int8)), "'block.a.weight_s_rel' does not fit"),
    "no scales of rows": (without(f"{A}.weight_s_channel"), "'block.a.weight_s_channel' is missing"),
    "no scales of groups": (without(f"{A}.weight_s_rel"), "'block.a.weight_s_rel' is missing"),
    "scales of groups too few": (becomes(f"{A}.weight_s_rel", torch.ones(8, 1)), "'block.a.weight_s_rel' does not fit"),
    "a long table": (becomes(f"{A}.weight_codebook", torch.ones(17)), "'block.a.weight_s_rel' does not fit"),
    "a correction": (becomes(f"{A}.weight_correction", torch.ones(2, 8)), "'block.a.weight_correction' has no place"),
    "scales of another format": (becomes(f"{A}.weight_scale", torch.ones(8)), "'block.a.weight_scale' has no place"),
    "a scale of an input": (becomes(f"{A}.input_scale", torch.ones(())), "'block.a.input_scale' has no place"),
    "a group of three": (says(**W4A8, group_size=3), "has no group of scales"),
    "a group of text": (says(**W4A8, group_size="16"), "has no group of scales"),
    "no rotation": (says(**W4A8, convrot=False), "'block.a.comfy_quant' is not rotated"),
    "a word of the other format": (says(**W4A8, linear_dtype="int8"), "says what is not known here"),
    "products of no kind": (
        says(format="convrot_w4a4", linear_dtype="fp8"),
        "'linear_dtype' of marker 'block.a.comfy_quant'",
    ),
    "another format for its tensors": (says(format="convrot_w4a4"), "'block.a.weight_scale' is missing"),
}  # fmt: skip


@pytest.mark.parametrize("what", WORSE)
def test_codes_of_a_table_are_refused_by_the_tensor(what: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    file = file_of({f"{A}.bias": torch.zeros(8)}, {A: w4a8(torch.randn(8, 32))})
    read_file(open_file(file.write(tmp_path / "good.safetensors")))
    change, words = WORSE[what]
    change(file)
    with pytest.raises(ArtifactError, match=words):
        read_file(open_file(file.write(tmp_path / "bad.safetensors")))


def test_codes_of_four_bits_have_a_scale_for_each_row_and_tables_numbers(tmp_path: Path) -> None:
    file = file_of({}, {A: w4a4(torch.randn(8, 32))})
    file.tensors[f"{A}.weight_scale"] = torch.ones(())
    with pytest.raises(ArtifactError, match="'block.a.weight_scale' is no scale"):
        read_file(open_file(file.write(tmp_path / "some.safetensors")))
    file = file_of({}, {A: w4a8(torch.randn(8, 32))})
    file.tensors[f"{A}.weight_codebook"][3] = torch.nan
    found = read_file(open_file(file.write(tmp_path / "some.safetensors")))
    with pytest.raises(ArtifactError, match="'block.a.weight_s_rel' or the table beside it is not finite"):
        found.layers[A].rows(found.file)


def test_the_dialect_of_int8_fast_must_say_what_scales_it_has(tmp_path: Path) -> None:
    layer = int8(torch.randn(8, 32))
    file = file_of({}, {A: fast(layer)})
    file.mark(A, {"per_row": False})
    with pytest.raises(ArtifactError, match="'block.a.weight_scale' is no scale"):
        read_file(open_file(file.write(tmp_path / "some.safetensors")))
