"""Pipelines whose networks stay in their files: the same folder as ever, by any method, in little memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    StableDiffusionPipeline,
)
from safetensors.torch import load_file, save_file

from stepquant.core import mapped
from stepquant.errors import ModelError, StepquantError
from stepquant.job import Recipe, load, quantize_to
from stepquant.job.in_files import load_in_files, put
from stepquant.progress import Silent
from tests.conftest import make_class_pipeline, make_one_level
from tests.contracts.resident import in_memory
from tests.contracts.smallest import Counting, Killed
from tests.job.test_job import contents
from tests.models.media import ENCODER, FILM, film_pipeline

pytestmark = pytest.mark.usefixtures("coarse")
FILE = "diffusion_pytorch_model.safetensors"
FEW: dict[str, Any] = {"samples": 16, "trajectories": 4}
WAYS = {"minmax": ("w8a8", FEW), "brecq": ("w4a8", FEW | {"iterations": 4, "step_iterations": 2})}


def recipe(model: Path, method: str = "minmax", **changes: Any) -> Recipe:
    scheme, settings = WAYS[method]
    fields: dict[str, Any] = {"model": str(model), "method": method, "scheme": scheme, "settings": settings}
    return Recipe.of(**fields | {"steps": 4} | changes)


@pytest.fixture
def saved(pipeline: DDIMPipeline, tmp_path: Path) -> Path:
    pipeline.save_pretrained(tmp_path / "float")
    return tmp_path / "float"


@pytest.fixture
def halved(class_pipeline: DiTPipeline, tmp_path: Path) -> Path:
    """Its transformer in bfloat16, and in several files."""
    class_pipeline.save_pretrained(tmp_path / "halved")
    folder = tmp_path / "halved" / "transformer"
    (folder / FILE).unlink()
    class_pipeline.transformer.to(torch.bfloat16).save_pretrained(folder, max_shard_size="50KB")
    return tmp_path / "halved"


def quantized(monkeypatch: pytest.MonkeyPatch, asked: Recipe, out: Path, **options: Any) -> dict[str, bytes]:
    """What is in the folder, made with a cache of its own."""
    monkeypatch.setenv("STEPQUANT_CACHE", str(out.with_name(f"{out.name}-cache")))
    return contents(quantize_to(asked, out, **options).out)


@pytest.mark.parametrize("method", WAYS)
@pytest.mark.parametrize("kind", ["saved", "halved"])
def test_the_folder_is_the_same(
    kind: str, method: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = recipe(request.getfixturevalue(kind), method)
    usual = quantized(monkeypatch, asked, tmp_path / "usual")
    small = quantized(monkeypatch, asked, tmp_path / "small", low_memory=True, memory=0)
    assert small == usual
    assert len(usual) > 3


@pytest.fixture
def with_parts(text_pipeline: StableDiffusionPipeline, tmp_path: Path) -> Path:
    """Its text encoder in bfloat16, under the names that older files have."""
    folder = tmp_path / "parts"
    text_pipeline.text_encoder.to(torch.bfloat16)
    text_pipeline.save_pretrained(folder)
    file = folder / "text_encoder" / "model.safetensors"
    save_file(
        {f"text_model.{name}": value for name, value in load_file(file).items()}, file, {"format": "pt"}
    )
    return folder


@pytest.mark.parametrize("scheme", ["w8a8", "w4a16", "w8a8-dynamic"])
def test_parts_stay_in_their_files_too(
    with_parts: Path, scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = recipe(with_parts, scheme=scheme, prompts=("a",), components=("unet", "text_encoder", "vae"))
    usual = quantized(monkeypatch, asked, tmp_path / "usual")
    assert quantized(monkeypatch, asked, tmp_path / "small", low_memory=True) == usual
    pipe = load_in_files(str(with_parts), "cpu", Silent())
    weights = [*pipe.text_encoder.parameters(), *pipe.vae.parameters()]
    assert weights
    assert all(isinstance(one, mapped.MappedParameter) and one.dtype == torch.float32 for one in weights)


def test_parts_that_a_pipeline_may_lack_stay_in_their_files(tmp_path: Path) -> None:
    """As the transformers of Wan, which diffusers would load beside those that it is given."""
    film_pipeline().save_pretrained(tmp_path / "film")
    found = load_in_files(str(tmp_path / "film"), "cpu", Silent())
    for network in (found.transformer, found.transformer_2):
        assert all(isinstance(one, mapped.MappedParameter) for one in network.parameters())


@pytest.mark.parametrize("opened", [load, partial(load_in_files, device="cpu", progress=Silent())])
def test_parts_that_a_pipeline_was_saved_without_are_not_missed(
    opened: Callable[[str], Any], with_parts: Path
) -> None:
    """As SD3 without the largest of its text encoders, which diffusers alone does not open again."""
    file = with_parts / "model_index.json"
    index = json.loads(file.read_text())
    file.write_text(json.dumps(index | {"text_encoder": [None, None], "tokenizer": [None, None]}))
    with pytest.raises(ValueError, match="text_encoder"):
        StableDiffusionPipeline.from_pretrained(with_parts, local_files_only=True)
    found = opened(str(with_parts))
    assert found.text_encoder is found.tokenizer is None
    assert list(found.unet.parameters())


def test_autoencoders_under_other_names_are_loaded(with_parts: Path) -> None:
    """diffusers knows what layers were called in older files; weights are the same."""
    file = with_parts / "vae" / FILE
    known = load_file(file)
    older = {name.replace("to_out.0", "proj_attn"): value for name, value in known.items()}
    assert older.keys() != known.keys()
    save_file(older, file, {"format": "pt"})
    found = load_in_files(str(with_parts), "cpu", Silent()).vae
    assert not any(isinstance(one, mapped.MappedParameter) for one in found.parameters())
    assert all(torch.equal(value, known[name]) for name, value in found.state_dict().items())


@pytest.mark.parametrize(
    "changes",
    [
        {"scheme": "auto-6.5", "settings": {"samples": 8}},
        {"policy": "last=1", "settings": {"samples": 8}},
        {"method": "minmax+tac", "scheme": "w8a8", "settings": {"minmax.samples": 8, "tac.samples": 4}},
    ],
    ids=["auto", "policy", "corrected"],
)
def test_what_asks_the_whole_network_is_the_same(
    changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    DDIMPipeline(make_one_level(), DDIMScheduler()).save_pretrained(tmp_path / "float")
    asked = Recipe.of(
        **{"model": str(tmp_path / "float"), "method": "minmax", "scheme": "w8a8", "steps": 4} | changes
    )
    usual = quantized(monkeypatch, asked, tmp_path / "usual")
    assert quantized(monkeypatch, asked, tmp_path / "small", low_memory=True) == usual


def test_an_interrupted_run_goes_on(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed where it learns, from files that are no float model's own; the cache keeps nothing else of it."""
    asked = recipe(saved, "brecq")
    whole, counting = tmp_path / "whole", Counting()
    usual = quantized(monkeypatch, asked, whole, low_memory=True, progress=counting)
    monkeypatch.setenv("STEPQUANT_CACHE", str(tmp_path / "again-cache"))
    with pytest.raises(Killed):
        quantize_to(asked, tmp_path / "again", low_memory=True, progress=Counting(counting.done * 4 // 5))
    assert not (tmp_path / "again").exists()
    resumed = Counting()
    again = quantized(monkeypatch, asked, tmp_path / "again", low_memory=True, resume=True, progress=resumed)
    assert again == usual
    assert resumed.done < counting.done
    assert not list((tmp_path / "again-cache").rglob("mapped-*"))


def test_weights_of_another_type_are_said(halved: Path) -> None:
    said: list[str] = []

    class Noting(Silent):
        def note(self, words: str) -> None:
            said.append(words)

    found = load_in_files(str(halved), "cpu", Noting()).transformer
    assert {value.dtype for value in found.state_dict().values()} == {torch.float32}
    assert "transformer are BF16 in their files" in said[0]


@pytest.mark.parametrize(
    ("kept", "told"), [(slice(-40), "its header tells of"), (slice(40), "damaged"), (slice(0), "damaged")]
)
def test_files_that_end_early_are_never_mapped(saved: Path, tmp_path: Path, kept: slice, told: str) -> None:
    file = saved / "unet" / FILE
    file.write_bytes(file.read_bytes()[kept])
    with pytest.raises(ModelError, match=told):
        quantize_to(recipe(saved), tmp_path / "out", low_memory=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what is mapped")
def test_nobody_can_write_to_the_model(saved: Path) -> None:
    file = saved / "unet" / FILE
    found = load_in_files(str(saved), "cpu", Silent()).unet
    lines = [line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(file))]
    assert lines
    assert all(line.split()[1] == "r--s" for line in lines)
    for name, value in load_file(file).items():
        assert torch.equal(found.get_parameter(name), value)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells which memory is a file's")
def test_saved_tables_are_no_memory_and_may_be_written_to() -> None:
    network, saved = torch.nn.Module(), torch.arange(4096.0)
    network.register_buffer("table", torch.empty(0))
    put(network, "table", saved)
    table = network.get_buffer("table")
    assert torch.equal(table, saved)
    assert in_memory([table]) == 0 < in_memory([saved])
    table.zero_()
    assert saved.count_nonzero() == 4095


def test_what_cannot_stay_in_files_is_said(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(StepquantError, match="read by the CPU"):
        quantize_to(recipe(saved, device="meta"), tmp_path / "out", low_memory=True)
    quantize_to(recipe(saved), tmp_path / "out", low_memory=True)
    with pytest.raises(ModelError, match="quantized already"):
        quantize_to(recipe(tmp_path / "out"), tmp_path / "twice", low_memory=True)


def test_a_full_disk_is_an_error(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(mapped.os, "posix_fallocate", full)
    with pytest.raises(StepquantError, match="No space left") as error:
        quantize_to(recipe(saved), tmp_path / "out", low_memory=True)
    assert "STEPQUANT_CACHE" in str(error.value)


LIMITED = """
import json, os, resource, sys, traceback
import torch
from stepquant.core.ranges import lp_search, lp_search_binned
from stepquant.job import Recipe, quantize_to
from stepquant.job.memory import status_bytes
from stepquant.models.call import Call

for search in (lp_search, lp_search_binned):
    search.__kwdefaults__ |= {"candidates": 3}

def run(model, out, more, way, calls=(), **asked):
    learn()  # what libraries import then is no part of a model
    limit = status_bytes("VmData") + more
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    recipe = Recipe.of(model=model, steps=2, calls=tuple(map(Call.of, calls)), **asked)
    quantize_to(recipe, out, low_memory=way == "low", memory=0)

def learn():
    learnt = torch.nn.Linear(4, 4)
    learnt(torch.ones(1, 4)).sum().backward()
    torch.optim.Adam(learnt.parameters(), fused=True).step()

torch.optim.Adam([torch.nn.Parameter(torch.ones(1))], fused=True)
for number, asked in enumerate(json.loads(sys.argv[2])):
    out = f"{sys.argv[1]}/{number}"
    child = os.fork()
    if not child:
        os.dup2(os.open(f"{out}.err", os.O_WRONLY | os.O_CREAT), 2)
        try:
            run(asked.pop("model"), out, **asked)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
RECORDS = {"samples": 16, "trajectories": 8, "batch": 4}

RUNS: list[dict[str, Any]] = [
    {"way": "usual", "method": "minmax", "scheme": "w8a8", "settings": RECORDS},
    {"way": "low", "method": "minmax", "scheme": "w8a8", "settings": RECORDS},
    {"way": "low", "method": "minmax", "scheme": "w4a16", "settings": RECORDS},
    {
        "way": "low",
        "method": "brecq",
        "scheme": "w4a8",
        "settings": RECORDS | {"iterations": 2, "step_iterations": 1},
    },
]
TEXTS: dict[str, Any] = {
    "method": "minmax",
    "settings": RECORDS,
    "components": ["transformer", "text_encoder"],
    "calls": [{"prompt": "a", **FILM}],
}
OF_TEXTS = [
    TEXTS | {"way": way, "scheme": scheme}
    for way, scheme in (("usual", "w8a8"), ("low", "w8a8"), ("low", "w4a16"))
]


def large() -> Any:
    """A pipeline around many narrow blocks and large tables."""
    made: Any = make_class_pipeline()
    with torch.device("meta"):
        network = DiTTransformer2DModel(
            num_attention_heads=5,
            attention_head_dim=32,
            in_channels=4,
            out_channels=4,
            num_layers=16,
            num_embeds_ada_norm=7000,
            sample_size=8,
        )
    network.to_empty(device="cpu").requires_grad_(False)
    for value in network.state_dict().values():
        value.fill_(0.01)
    made.register_modules(transformer=network)
    return made


def large_text() -> Any:
    """A pipeline around a text encoder of many blocks."""
    made = film_pipeline(denoisers=1)
    with torch.device("meta"):
        config = transformers.UMT5Config(**ENCODER | {"d_ff": 8192, "num_layers": 16})
        network = transformers.UMT5EncoderModel(config)
    network.to_empty(device="cpu").requires_grad_(False)
    for value in network.state_dict().values():
        value.fill_(0.01)
    made.register_modules(text_encoder=network)
    return made


@pytest.fixture(scope="module")
def limited(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[int, str, Path]]:
    """What each run ended with, what it said, and its folder; it may take 1 / 1.2 of the float weights in float32."""
    folder, each = tmp_path_factory.mktemp("large"), []
    for component, made, runs in (("transformer", large(), RUNS), ("text_encoder", large_text(), OF_TEXTS)):
        network, place = getattr(made, component), folder / component
        more = int(sum(4 * value.numel() for value in network.parameters()) / 1.2)
        made.save_pretrained(place)
        network.to(torch.bfloat16).save_pretrained(place / component)  # as models come
        each += [one | {"model": str(place), "more": more} for one in runs]
    asked = json.dumps(each)
    # What is freed goes back to the system, and no thread has a heap of its own: the same on every machine.
    calm = os.environ | {
        "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1",
        "HF_DEACTIVATE_ASYNC_LOAD": "1", "STEPQUANT_CACHE": str(folder / "cache"),
    }  # fmt: skip
    words = [sys.executable, "-W", "ignore", "-c", LIMITED, str(folder), asked]
    done = subprocess.run(words, capture_output=True, text=True, env=calm)
    assert done.returncode == 0, done.stderr
    ends = map(int, done.stdout.split())
    return [
        (end, (folder / f"{number}.err").read_text(), folder / str(number)) for number, end in enumerate(ends)
    ]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits what a process may write to")
@pytest.mark.parametrize(
    "number",
    range(len(RUNS + OF_TEXTS)),
    ids=[f"{one['way']}-{one['method']}-{one['scheme']}" for one in RUNS]
    + [f"text-{one['way']}-{one['scheme']}" for one in OF_TEXTS],
)
def test_a_model_larger_than_what_the_process_may_take(
    number: int, limited: list[tuple[int, str, Path]]
) -> None:
    """Its float weights are 1.2 times the memory that is left to the process, which loads them in vain."""
    (end, said, out), works = limited[number], (RUNS + OF_TEXTS)[number]["way"] == "low"
    assert (end == 0) == works, said
    assert ("memory" in said.lower()) == (not works), said
    assert (out / "model_index.json").exists() == works
