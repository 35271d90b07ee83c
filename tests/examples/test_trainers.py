"""The trainers in examples/: small runs to their end, resumed runs, exported pipelines, and what users get wrong."""

from __future__ import annotations

import importlib
import io
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from PIL import Image
from safetensors import safe_open

EXAMPLES = Path(__file__).parents[2] / "examples"
CLASSES = ["frog", "star sparkles"]
SHORT = ["--threads", "1", "--batch", "4", "--save-minutes", "100"]


def png(rng: np.random.Generator, side: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8)).save(file, "png")
    return file.getvalue()


def write_split(folder: Path, split: str, sides: list[int], **replaced: object) -> None:
    rng, count = np.random.default_rng(0), len(sides)
    columns = {
        "img": [{"bytes": png(rng, side), "path": None} for side in sides],
        "label": [row % len(CLASSES) for row in range(count)],
        "caption": [f"{CLASSES[row % 2]}, teal body, cool background" for row in range(count)],
    } | replaced
    told = {"info": {"features": {"label": {"names": CLASSES}}}}
    table = pa.table({name: values for name, values in columns.items() if values is not None})
    table = table.replace_schema_metadata({"huggingface": json.dumps(told)})
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, folder / f"{split}.parquet")


@pytest.fixture(scope="module", autouse=True)
def scripts() -> Iterator[None]:
    """The folder of examples is where its scripts look for each other; what they set, they leave."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    threads, before = torch.get_num_threads(), set(sys.modules)
    sys.path.insert(0, str(EXAMPLES))
    yield
    sys.path.remove(str(EXAMPLES))
    for name in set(sys.modules) - before:
        if str(EXAMPLES) in str(getattr(sys.modules[name], "__file__", None)):
            del sys.modules[name]
    torch.set_num_threads(threads)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def call(script: str, *options: object) -> None:
    """As from the shell, in this process."""
    module = importlib.import_module(script.removesuffix(".py"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *map(str, options)])
        module.main(module.parser())


def error(script: str, *options: object) -> str:
    """The one line it ends with."""
    with pytest.raises(SystemExit) as stopped:
        call(script, *options)
    assert isinstance(stopped.value.code, str), "an error of the user's exits with its text and code 1"
    return stopped.value.code


def seen(run: Path) -> int:
    with safe_open(run / "checkpoint.safetensors", "pt") as stored:
        return json.loads(stored.metadata()["state"])["seen"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for split in ("train", "test"):
        write_split(folder, split, [32] * 8)
    return folder


@pytest.fixture(scope="module")
def autoencoder(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("autoencoder")
    call(
        "train_autoencoder.py", "train", "--data", data, "--run", run, "--images", 4, "--cooldown", 4, *SHORT
    )
    return run


def test_a_unet_is_trained_resumed_and_exported(data: Path, tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    begin = ["train", "--data", data, "--run", run, *SHORT]
    call("train_unet.py", *begin, "--images", 4, "--cooldown", 0)
    assert seen(run) == 4
    call("train_unet.py", *begin, "--images", 8, "--cooldown", 4)
    assert seen(run) == 12
    call("train_unet.py", "export", "--run", run, "--out", out, "--samples", 2)
    pipe = DiffusionPipeline.from_pretrained(out)
    assert pipe(num_inference_steps=1, output_type="np").images.shape == (1, 32, 32, 3)
    assert "12 images" in (out / "README.md").read_text()


def test_a_transformer_draws_the_class_that_is_asked(
    data: Path, autoencoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    files = ["--data", data, "--autoencoder", autoencoder, "--run", run]
    call("train_dit.py", "train", *files, "--images", 4, "--cooldown", 4, *SHORT)
    (latents,) = autoencoder.glob("latents-*.safetensors")
    latents.chmod(0o444)
    call("train_dit.py", "export", *files, "--out", out, "--samples", 2)
    assert latents.stat().st_mode & 0o777 == 0o444, "latents are computed once"
    pipe = DiffusionPipeline.from_pretrained(out)
    assert pipe.get_label_ids(["star sparkles"]) == [1]
    drawn = pipe.transformer(
        torch.zeros(2, 4, 16, 16), timestep=torch.tensor([5, 5]), class_labels=torch.tensor([77, 1000])
    ).sample
    assert torch.equal(drawn[0], drawn[1]), "a label beyond the classes must be no class"
    assert pipe(class_labels=[0], num_inference_steps=1, output_type="np").images.shape == (1, 32, 32, 3)
    assert "recognised as asked" in measured(capsys, out, data)


def measured(capsys: pytest.CaptureFixture[str], out: Path, data: Path) -> str:
    capsys.readouterr()
    call("measure_models.py", "--pipeline", out, "--data", data, "--samples", 3, "--steps", 1, "--threads", 1)
    return capsys.readouterr().out


def test_a_text_model_reads_words(
    data: Path, autoencoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    files = ["--data", data, "--autoencoder", autoencoder, "--run", run]
    call("train_text.py", "train", *files, "--images", 4, "--cooldown", 4, *SHORT)
    call("train_text.py", "export", *files, "--out", out, "--samples", 2)
    pipe = DiffusionPipeline.from_pretrained(out)
    assert pipe.tokenizer.tokenize("Frog, teal zebra") == ["frog", "teal", "<unknown>"]
    images = pipe("frog, teal body", num_inference_steps=1, output_type="np").images
    assert images.shape == (1, 32, 32, 3)
    said = measured(capsys, out, data)
    assert all(word in said for word in ("FD-CH to test", "recognised as asked", "truth: "))


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (16, 16)])
def test_muon_steps_as_the_one_of_torch(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Which multiplies in bfloat16, so that its steps are off by one or two percent; ours not on every processor."""
    training = importlib.import_module("training")
    monkeypatch.setattr(training, "multiplies_bf16", lambda _: False)
    muon, torch_muon = training.Muon, torch.optim.Muon
    torch.manual_seed(0)
    begin = torch.randn(shape)
    ours, theirs = (torch.nn.Parameter(begin.clone()) for _ in range(2))
    both = muon([ours], 0.1), torch_muon([theirs], 0.1, 0.0, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        ours.grad = torch.randn(shape)
        theirs.grad = ours.grad.clone()
        for optimizer in both:
            optimizer.step()
    assert (ours - theirs).norm() < 0.03 * (theirs - begin).norm()


def test_a_finished_training_goes_on_at_the_full_rate(data: Path, tmp_path: Path) -> None:
    begin = ["train", "--data", data, "--run", tmp_path, *SHORT]
    call("train_unet.py", *begin, "--images", 4, "--cooldown", 4)
    with pytest.MonkeyPatch.context() as patch:
        trainer, rates = importlib.import_module("training").Trainer, []
        step = trainer.step
        patch.setattr(trainer, "step", lambda self, loss: (step(self, loss), rates.append(self.rate)))
        call("train_unet.py", *begin, "--images", 16, "--cooldown", 4, "--warmup", 1, "--lr", 1e-3)
    assert seen(tmp_path) == 20
    assert rates == [1e-3, 1e-3, 0.0]


def test_images_of_28_pixels_are_padded(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write_split(tmp_path / "data", split, [28] * 8)
    run = tmp_path / "run"
    options = ["--data", tmp_path / "data", "--run", run, "--images", 4, "--cooldown", 0, *SHORT]
    call("train_unet.py", "train", *options)
    with safe_open(run / "checkpoint.safetensors", "pt") as stored:
        assert json.loads(stored.metadata()["networks"])["unet"]["sample_size"] == 32


@pytest.mark.parametrize(
    ("script", "sides", "replaced", "said"),
    [
        ("train_unet.py", [32] * 8, {"img": None}, "has no column img"),
        ("train_text.py", [32] * 8, {"caption": None}, "has no column caption"),
        ("train_unet.py", [32, 16] * 4, {}, "different sizes (16x16, 32x32)"),
        (
            "train_unet.py",
            [32] * 8,
            {"label": [0, 1, 2, 0, 0, 0, 0, 0]},
            "row 2: label 2 is none of 2 classes",
        ),
        (
            "train_unet.py",
            [32] * 8,
            {"label": [0, -1, 0, 0, 0, 0, 0, 0]},
            "row 1: label -1 is none of 2 classes",
        ),
        (
            "train_unet.py",
            [32] * 8,
            {"img": [{"bytes": b"no", "path": None}] * 8},
            "row 0: img holds no picture",
        ),
    ],
)
def test_data_that_do_not_fit_are_one_error(
    script: str, sides: list[int], replaced: dict, said: str, tmp_path: Path
) -> None:
    write_split(tmp_path / "data", "train", sides, **replaced)
    assert said in error(script, "train", "--data", tmp_path / "data", "--run", tmp_path / "run", *SHORT)


def test_a_checkpoint_of_another_configuration_is_named(
    data: Path, autoencoder: Path, tmp_path: Path
) -> None:
    said = error("train_unet.py", "train", "--data", data, "--run", autoencoder, *SHORT)
    assert "networks of another configuration" in said


def test_a_missing_folder_and_a_broken_checkpoint(data: Path, tmp_path: Path) -> None:
    missing = error("train_unet.py", "train", "--data", tmp_path / "none", "--run", tmp_path, *SHORT)
    assert "no train*.parquet" in missing
    (tmp_path / "checkpoint.safetensors").write_bytes(b"12345678")
    broken = error("train_unet.py", "train", "--data", data, "--run", tmp_path, *SHORT)
    assert "is no checkpoint of these trainers" in broken


def test_a_network_is_not_compiled_where_that_spoils_its_gradients(data: Path, tmp_path: Path) -> None:
    said = error(
        "train_unet.py", "train", "--data", data, "--run", tmp_path, *SHORT, "--device", "cpu", "--compile"
    )
    assert "leave it out" in said


def test_errors_count_by_what_they_do_to_the_image() -> None:
    """Predictions off by one everywhere: the loss is the mean over the steps of what min-SNR gives a v-prediction."""
    training = importlib.import_module("training")
    kept = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    expected = float((training.densities().numpy() * np.minimum(1, 25 / (kept / (1 - kept)))).sum())
    loss, clean = training.Loss(), torch.zeros(4000, 1, 2, 2)
    scheduler = DDIMScheduler(**training.SCHEDULER)

    def off_by_one(noisy: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
        # v of a black image is signal times noise, and what is seen of it sigma times noise.
        kept = scheduler.alphas_cumprod[steps].view(-1, 1, 1, 1)
        return noisy * (kept / (1 - kept)).sqrt() + 1

    assert loss(off_by_one, clean).item() == pytest.approx(expected, rel=0.01)


def test_a_training_that_is_told_to_stop_saves_and_goes_on(data: Path, tmp_path: Path) -> None:
    options = ["train", "--data", data, "--run", tmp_path, "--images", 10**9, *SHORT]
    command = [sys.executable, str(EXAMPLES / "train_unet.py"), *map(str, options), "--save-minutes", "0"]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    while not (tmp_path / "checkpoint.safetensors").exists():
        assert running.poll() is None
        time.sleep(0.05)
    running.terminate()
    said, _ = running.communicate()
    assert running.returncode == 0
    assert f"saved at {seen(tmp_path)} images" in said
    before = seen(tmp_path)
    call("train_unet.py", "train", "--data", data, "--run", tmp_path, "--images", 0, "--cooldown", 4, *SHORT)
    assert seen(tmp_path) == before + 4
