"""GGUF files become folders that hold the numbers of their blocks, in their integers."""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from torch import Tensor, nn

from stepquant.cli.app import USER, main
from stepquant.errors import ArtifactError, PlanError
from stepquant.hub.foreign import names
from stepquant.hub.foreign.read import read
from stepquant.job.foreign import convert
from stepquant.runtime.layers.layer import IntegerLayer
from tests.foreign.gguf_writer import KINDS, Packed, rounded, text, write_gguf
from tests.foreign.originals import ORIGINALS
from tests.foreign.test_convert import PREFIX, folder_of, predicted, tiny
from tests.runtime.synthetic import relative

Tensors = dict[str, Tensor | Packed]


def packed(tensors: dict[str, Tensor], kinds: tuple[str, ...] = tuple(KINDS)) -> Tensors:
    """Weights in blocks of one type after the other, where they fill them; biases and the rest in 16 and 32 bits."""
    made: Tensors = {}
    following = cycle(kinds)
    for name, value in tensors.items():
        blocks = name.endswith(".weight") and value.dim() > 1 and value.numel() % 256 == 0
        small = value.half() if value.dim() > 1 else value
        made[name] = rounded(next(following), value) if blocks else small
    return made


def floats(tensors: Tensors) -> dict[str, Tensor]:
    return {name: value.weight if isinstance(value, Packed) else value for name, value in tensors.items()}


def original(name: str) -> tuple[Any, dict[str, Any], dict[str, Tensor]]:
    model, given = tiny(name)
    return model, given, ORIGINALS[name]({path: value.clone() for path, value in model.state_dict().items()})


@pytest.mark.parametrize("name", ["size_conditioned", "wan", "z_image"])
def test_numbers_of_every_type_are_kept(name: str, tmp_path: Path) -> None:
    """Of linears, fused ones and convolutions, whose rows lie in the file in rows of another length."""
    model, given, tensors = original(name)
    made = packed(tensors)
    source = write_gguf(
        tmp_path / "some.gguf",
        {PREFIX + path: value for path, value in made.items()} if name == "wan" else made,
    )
    told = convert(source, tmp_path / "out", config=folder_of(model, tmp_path))
    loaded = type(model).from_pretrained(tmp_path / "out")
    mapping = SINGLE_FILE_LOADABLE_CLASSES[type(model).__name__]["checkpoint_mapping_fn"]
    want = mapping(
        checkpoint={PREFIX + path: value for path, value in floats(made).items()}, config=dict(model.config)
    )
    integers = {path: one for path, one in loaded.named_modules() if isinstance(one, IntegerLayer)}
    types = {value.kind for value in made.values() if isinstance(value, Packed)}
    assert types == set(KINDS) or name == "wan"
    assert set(told.recipe["formats"]) == types
    assert told.layers == len(integers)
    assert any(isinstance(model.get_submodule(path), nn.Linear) for path in integers)
    assert any(one.spec.offset for one in integers.values())
    assert all(one.spec.input is None for one in integers.values())
    back = loaded.dequantize().state_dict()
    assert set(back) == set(want)
    assert all(torch.equal(back[path], value.float()) for path, value in want.items())
    model.load_state_dict(want)
    assert (
        relative(predicted(type(model).from_pretrained(tmp_path / "out"), given), predicted(model, given))
        < 0.02
    )


def test_inspect_of_what_was_written_says_where_it_came_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, _ = tiny("flux")
    made = packed({path: value.clone() for path, value in model.state_dict().items()}, ("Q8_0", "Q2_K"))
    source = write_gguf(tmp_path / "some.gguf", made)
    convert(source, tmp_path / "out", config=folder_of(model, tmp_path))
    assert main(["inspect", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert re.search(
        r"converted from 'some': \d+ layers of Q2_K, \d+ layers of Q8_0, in GGUF of architecture some", said
    )
    assert "layers with weights on uint2/group16/sym, inputs float" in said
    config = tmp_path / "out" / "config.json"
    config.write_text(config.read_text().replace('"program": "GGUF"', '"program": "mine"'))
    assert main(["inspect", str(tmp_path / "out")]) == USER
    assert "edited" in capsys.readouterr().err


def test_convolutions_keep_their_integers(tmp_path: Path) -> None:
    model, _, tensors = original("text_to_image")
    source = write_gguf(tmp_path / "some.gguf", packed(tensors, ("Q3_K", "Q6_K")))
    told = convert(source, tmp_path / "out", config=folder_of(model, tmp_path))
    loaded = type(model).from_pretrained(tmp_path / "out")
    convolution = loaded.down_blocks[1].resnets[0].conv2
    assert str(convolution.spec.weight) in ("int6/group16/asym", "int3/group16/asym")
    assert told.recipe["floats"] == {}
    assert told.recipe["scheme"] == "Q3_K, Q6_K"


def test_blocks_that_go_on_from_row_to_row_become_float(tmp_path: Path) -> None:
    """As of a first convolution of four channels, whose rows have 36 numbers."""
    made = packed({"input_blocks.0.0.weight": torch.randn(64, 4, 3, 3)}, ("Q8_0",))
    found = read(write_gguf(tmp_path / "some.gguf", made))
    layer = found.layers["input_blocks.0.0"]
    assert layer.shape == (64, 4, 3, 3)
    assert "go on from row to row" in layer.why_float
    assert torch.equal(layer.floats(found.file), floats(made)["input_blocks.0.0.weight"])


def test_weights_that_are_no_layers_become_float(tmp_path: Path) -> None:
    """What a converter cuts otherwise than by rows, or a network adds instead of multiplying."""
    model, given = tiny("sd3")
    tensors = ORIGINALS["sd3"]({path: value.clone() for path, value in model.state_dict().items()})
    made = packed({n: v for n, v in tensors.items() if v.shape[-1] % 32 == 0}, ("Q8_0",))
    made = tensors | made
    made["pos_embed"] = rounded("Q5_1", tensors["pos_embed"])
    source = write_gguf(tmp_path / "some.gguf", made)
    told = convert(source, tmp_path / "out", config=folder_of(model, tmp_path))
    assert told.recipe["floats"] == {"pos_embed": "it is no weight of a layer"}
    loaded = type(model).from_pretrained(tmp_path / "out")
    assert torch.equal(loaded.state_dict()["pos_embed.pos_embed"], floats(made)["pos_embed"])
    assert relative(predicted(loaded, given), predicted(model, given)) < 0.05


CHANGES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "columns": lambda query, key: query.flip(1),
    "a factor": lambda query, key: query * 2,
    "two types in one": lambda query, key: torch.cat([query[:16], key[:16]]),
}


@pytest.mark.parametrize("what", CHANGES)
def test_what_more_is_done_than_to_move_rows_is_done_to_floats(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = tiny("flux")
    a, b = (f"transformer_blocks.0.attn.{name}.weight" for name in ("to_q", "to_k"))
    tensors = {path: value.clone() for path, value in model.state_dict().items()}
    made: Tensors = tensors | {a: rounded("Q4_0", tensors[a]), b: rounded("Q8_0", tensors[b])}
    monkeypatch.setattr(names, "renamed", lambda given, *_: given | {a: CHANGES[what](given[a], given[b])})
    told = convert(
        write_gguf(tmp_path / "some.gguf", made), tmp_path / "out", config=folder_of(model, tmp_path)
    )
    became = {a.removesuffix(".weight")} | ({b.removesuffix(".weight")} if "two" in what else set())
    assert told.recipe["floats"] == dict.fromkeys(became, "the network has no use for its integers")
    back = type(model).from_pretrained(tmp_path / "out").dequantize().state_dict()
    want = floats(made)
    assert torch.equal(back[a], CHANGES[what](want[a], want[b]))
    assert torch.equal(back[b], want[b])


def test_a_file_of_floats_alone(tmp_path: Path) -> None:
    model, _ = tiny("flux")
    kinds = cycle((torch.float16, torch.bfloat16, torch.float32))
    made = {path: value.to(next(kinds)) for path, value in model.state_dict().items()}
    source = write_gguf(tmp_path / "some.gguf", made, {"general.architecture": "flux"}, alignment=64)
    told = convert(source, tmp_path / "out", config=folder_of(model, tmp_path))
    assert (told.layers, told.recipe["scheme"], told.recipe["dialect"]) == (0, "float", "flux")
    loaded = type(model).from_pretrained(tmp_path / "out")
    assert all(torch.equal(value, made[path].float()) for path, value in loaded.state_dict().items())


@pytest.fixture
def some() -> Tensors:
    torch.manual_seed(0)
    return {
        "block.a.weight": rounded("Q4_K", torch.randn(4, 256)),
        "block.b.weight": rounded("Q8_0", torch.randn(3, 64)),
        "block.a.bias": torch.zeros(4),
    }


def test_inspect_says_what_would_run(
    some: Tensors, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors: Tensors = {"vae.weight": torch.ones(3)} | {PREFIX + name: value for name, value in some.items()}
    source = write_gguf(
        tmp_path / "some.gguf", tensors, {"general.architecture": "flux", "some.list": [1, 2]}
    )
    assert main(["inspect", str(source), "--layers", "--json", str(tmp_path / "found.json")]) == 0
    said = capsys.readouterr().out
    assert "1 layers of Q4_K, 1 layers of Q8_0, in GGUF of architecture flux" in said
    assert "2 of 2 layers would keep their integers" in said
    assert "0 of 2 layers would run in integers here" in said
    found = json.loads((tmp_path / "found.json").read_text())
    assert (found["others"], found["floats"]) == (1, 1)
    assert [row["scales"] for row in found["layers"]] == ["32 inputs", "32 inputs"]
    assert all("weight-only" in row["reason"] for row in found["layers"])
    source.write_bytes(source.read_bytes()[:-64])
    assert main(["inspect", str(source)]) == USER
    assert "no intact GGUF file" in capsys.readouterr().err


def edited(old: bytes, new: bytes) -> Callable[[bytes], bytes]:
    def edit(data: bytes) -> bytes:
        assert data.count(old) == 1
        return data.replace(old, new)

    return edit


def told(name: str, number: int, *shape: int) -> bytes:
    """What a header says of a tensor."""
    return text(name) + struct.pack(f"<I{len(shape)}QI", len(shape), *reversed(shape), number)


A = told("block.a.weight", 12, 4, 256)
BAD: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "nothing": (lambda data: b"", "no intact GGUF file"),
    "something else": (lambda data: b"GGML" + data[4:], "no intact GGUF file"),
    "an old version": (lambda data: data[:4] + struct.pack("<I", 1) + data[8:], "no intact GGUF file"),
    "the other order of bytes": (
        lambda data: data[:4] + struct.pack(">I", 3) + data[8:],
        "no intact GGUF file",
    ),
    "cut off within a tensor": (lambda data: data[:-200], "tensor 'block.*' up to byte"),
    "cut off within the header": (lambda data: data[:90], "no intact GGUF file"),
    "too many tensors": (
        edited(struct.pack("<QQ", 3, 2), struct.pack("<QQ", 2**60, 2)),
        "no intact GGUF file",
    ),
    "too much metadata": (
        edited(struct.pack("<QQ", 3, 2), struct.pack("<QQ", 3, 2**60)),
        "no intact GGUF file",
    ),
    "a long name": (
        edited(text("block.a.bias"), struct.pack("<Q", 2**62) + b"block.a.bias"),
        "no intact GGUF file",
    ),
    "blocks that are not read": (
        edited(A, told("block.a.weight", 23, 4, 256)),
        "'block.a.weight' is of a type .*IQ4_XS",
    ),
    "an unknown type": (
        edited(A, told("block.a.weight", 99, 4, 256)),
        "'block.a.weight' is of a type .*type 99 of",
    ),
    "no multiple of a block": (edited(A, told("block.a.weight", 12, 8, 128)), "'block.a.weight' of shape"),
    "no numbers": (edited(A, told("block.a.weight", 12, 0, 256)), "'block.a.weight' of shape"),
    "a shape beyond the end": (
        edited(A, told("block.a.weight", 12, 2**40, 256)),
        "tensor 'block.a.weight' up to byte",
    ),
    "a name twice": (edited(text("block.b.weight"), text("block.a.weight")), "'block.a.weight' twice"),
    "floats of no size": (
        edited(
            text("block.a.bias") + struct.pack("<IQ", 1, 4), text("block.a.bias") + struct.pack("<IQ", 1, 0)
        ),
        "'block.a.bias' of shape",
    ),
    "many dimensions": (
        edited(A, A.replace(struct.pack("<I", 2), struct.pack("<I", 9))),
        "a tensor of 9 dimensions",
    ),
    "metadata of an unknown kind": (
        edited(struct.pack("<II", 4, 32), struct.pack("<II", 77, 32)),
        "metadata of kind 77",
    ),
    "alignment by nothing": (
        edited(struct.pack("<II", 4, 32), struct.pack("<II", 4, 0)),
        "general.alignment 0",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_damaged_files_are_one_error(what: str, some: Tensors, tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "some.gguf", some)
    change, words = BAD[what]
    read(source)
    source.write_bytes(change(source.read_bytes()))
    with pytest.raises(ArtifactError) as found:
        read(source)
    assert re.search(words, str(found.value), re.DOTALL)
    assert str(source) in str(found.value)


def test_a_shape_in_the_metadata_must_fit(some: Tensors, tmp_path: Path) -> None:
    name = "comfy.gguf.orig_shape.block.a.weight"
    assert read(write_gguf(tmp_path / "a.gguf", some, {name: [2, 512]})).layers["block.a"].shape == (2, 512)
    for shape in ([4, 128], [-4, -256], "4x256", []):
        with pytest.raises(ArtifactError, match="a shape of 1024 numbers"):
            read(write_gguf(tmp_path / "a.gguf", some, {name: shape}))


def test_missing_tensors_and_numbers_that_cannot_be(tmp_path: Path) -> None:
    model, _ = tiny("flux")
    config, out = folder_of(model, tmp_path), tmp_path / "out"
    made = packed({path: value.clone() for path, value in model.state_dict().items()}, ("Q8_0",))

    def refusal(tensors: Tensors) -> str:
        with pytest.raises(ArtifactError) as found:
            convert(write_gguf(tmp_path / "bad.gguf", tensors), out, config=config)
        assert not out.exists()
        return str(found.value)

    name = "transformer_blocks.0.attn.to_q.weight"
    assert f"'{name}' is missing" in refusal({n: v for n, v in made.items() if n != name})
    assert "'more.weight' is foreign" in refusal(made | {"more.weight": torch.ones(3)})
    narrow = rounded("Q8_0", torch.randn(32, 64))
    assert f"'{name}' does not fit the network" in refusal(made | {name: narrow})
    good = made[name]
    assert isinstance(good, Packed)
    infinite = Packed(good.kind, good.shape, struct.pack("<e", math.inf) + good.data[2:], good.weight)
    assert f"'{name}_scale' holds values that cannot be" in refusal(made | {name: infinite})


def test_a_scheme_rounds_what_integers_cannot_multiply(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And leaves alone what has a scale for the row, as in files of integers that came from here."""
    model, given, tensors = original("size_conditioned")
    few = {path: value for path, value in tensors.items() if "transformer_blocks.0" in path}
    made = tensors | packed(few, ("Q8_0", "Q4_K", "Q6_K"))
    kept = next(path for path in made if path.endswith("attn1.to_q.weight"))
    codes, scale = torch.randint(-127, 128, tensors[kept].shape), float(torch.tensor(0.003).half())
    bits = codes.to(torch.int8).reshape(-1, 32).numpy()
    data = b"".join(struct.pack("<e", scale) + row.tobytes() for row in bits)
    made[kept] = Packed("Q8_0", tuple(codes.shape), data, codes * scale)
    source = write_gguf(tmp_path / "some.gguf", made)
    config, out = folder_of(model, tmp_path), tmp_path / "out"
    asked = ["--config", str(config), "--scheme", "w8a8-dynamic", "--out", str(out)]
    assert main(["convert", str(source), *asked]) == 0
    assert "layers rounded to w8a8-dynamic" in capsys.readouterr().out
    loaded = type(model).from_pretrained(out)
    layers = {path: one for path, one in loaded.named_modules() if isinstance(one, IntegerLayer)}
    groups = [one for one in layers.values() if one.spec.weight.granularity == "group" or one.spec.offset]
    assert all(one.spec.input is None for one in groups)
    same = [one for one in layers.values() if torch.equal(one.dequantized(torch.float32), codes * scale)]
    assert [str(one.spec.weight) for one in same] == ["int8/tensor"]
    assert same[0].integer
    assert sum(one.integer for one in layers.values()) > len(layers) / 2
    convert(source, tmp_path / "exact", config=config)
    exact = type(model).from_pretrained(tmp_path / "exact")
    assert relative(predicted(loaded, given), predicted(exact, given)) < 0.05
    assert main(["inspect", str(out)]) == 0
    assert "layers rounded to w8a8-dynamic when it was converted" in capsys.readouterr().out
    with pytest.raises(PlanError, match="needs calibration"):
        convert(source, tmp_path / "other", config=config, scheme="w8a8")
