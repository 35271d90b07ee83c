"""Three greps: papers only in methods, devices only in the runtime, model classes only in models."""

from __future__ import annotations

import re

import pytest

from tests.shape.source import PACKAGE, files, part_of, shown

# One paper gave its name to a word in the files of other programs, convrot, which hub/ reads and writes.
PAPERS = (
    r"ptq4dm|q-?diffusion|eda-?dm|tfmq|brecq|qdrop|adaround|smoothquant|svdquant|viditq|mixdq|tdq|qncd|dilatequant|quest"
    r"|efficientdm|static_video|apqdm|adatsq|dgq"
)
DEVICES = r"cuda|onednn|mkldnn|amx|avx|vnni|rocm|mps"
MODELS = (
    r"UNet2D\w*Model|UNet2DConditionModel|DiTTransformer\w*|PixArt\w*|SD3\w*|Flux\w*|\w+Transformer[23]DModel"
)
VAGUE = r"utils?|misc|common|base|helpers?|manager|engine|wrapper"


def lines_with(pattern: str, allowed: tuple[str, ...], flags: int = re.IGNORECASE) -> list[str]:
    found = re.compile(rf"\b({pattern})\b", flags)
    return [
        f"{shown(file)}:{number}: {line.strip()}"
        for file in files()
        if part_of(file) not in allowed
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
        if found.search(line)
    ]


@pytest.mark.parametrize(
    ("pattern", "allowed", "defaults"),
    [
        # The default method of a command, and the sentence that tells users about it, must name it.
        (PAPERS, ("methods",), r"ptq4dm"),
        (DEVICES, ("runtime",), r"$^"),
        (MODELS, ("models",), r"$^"),
    ],
    ids=["papers", "devices", "models"],
)
def test_names_stay_where_they_belong(pattern: str, allowed: tuple[str, ...], defaults: str) -> None:
    wrong = [
        line
        for line in lines_with(pattern, allowed)
        if not (line.startswith(("cli/", "job/")) and re.search(defaults, line, re.IGNORECASE))
    ]
    assert not wrong, "\n".join(wrong)


def test_the_greps_find_what_they_look_for() -> None:
    assert any("ptq4dm.py" in line for line in lines_with(PAPERS, ()))
    assert any("runtime/cpu/products.py" in line for line in lines_with(DEVICES, ()))
    assert any("models/families/unet.py" in line for line in lines_with(MODELS, ()))


def test_no_file_has_a_vague_name() -> None:
    vague = [shown(file) for file in files() if re.fullmatch(VAGUE, file.stem)]
    assert not vague
    assert PACKAGE.is_dir()
