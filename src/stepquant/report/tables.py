"""The headline numbers as plain rows and as markdown."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from stepquant.schema import Number, Report, Times, Timing

QUANTIZED = "stepquant"
HEADER = ("", "float", "integer", "floor", "how")
NONE = "–"
DISTANCES = ("FD-CH", "FD-C10", "FD")  # of the package's own networks, and of the user's: FD (NAME)
HEADLINES = (
    *(
        "recognised",
        "truth",
        "broken",
        "PSNR",
        "motion PSNR",
        "SNR",
        "spectral distance",
        "SSIM",
        "LPIPS",
        "FID",
        "sFID",
        "KID",
        "IS",
        "CLIP score",
    ),
    *DISTANCES,
)


def table(results: Mapping[str, Any] | Report) -> list[tuple[str, ...]]:
    """What matters, first row the header: size, speed, quality, share in integers; unmeasured rows are left out."""
    report = results if isinstance(results, Report) else Report.from_json(results)
    return [
        HEADER,
        *size_rows(report),
        *speed_rows(report),
        *quality_rows(report),
        *error_rows(report),
        *share_rows(report),
    ]


def size_rows(report: Report) -> list[tuple[str, ...]]:
    if report.size is None:
        return []
    size = report.size
    how = f"weights on disk, {size.ratio:.3f} of fp32"
    return [("size", megabytes(size.float_bytes), megabytes(size.bytes), NONE, how)]


def speed_rows(report: Report) -> list[tuple[str, ...]]:
    """One row a batch size: the reference's time, ours, and how many times faster than each baseline."""
    out: list[tuple[str, ...]] = []
    for batch, rows in by_batch(report).items():
        ours = rows.get(QUANTIZED)
        reference = report.speed and rows.get(report.speed.reference)
        if ours is None or ours.milliseconds is None:
            continue
        theirs = milliseconds(reference.milliseconds if reference else None)
        others = [
            f"{times(row, ours)} {row.name}" for row in rows.values() if row is not ours and row.milliseconds
        ]
        how = ", ".join(others) or "one call of the denoiser"
        out.append((f"time, batch {batch}", theirs, milliseconds(ours.milliseconds), NONE, how))
    return out


def by_batch(report: Report) -> dict[int, dict[str, Timing]]:
    out: dict[int, dict[str, Timing]] = {}
    for row in report.speed.rows if report.speed else ():
        out.setdefault(row.batch, {})[row.name] = row
    return out


def times(other: Timing, ours: Timing) -> str:
    """How many times faster ours is, from ratios within rounds where there are any."""
    if ours.ratio and other.ratio:
        return f"{ours.ratio / other.ratio:.1f}×"
    return f"{(other.milliseconds or 0) / (ours.milliseconds or 1):.1f}×"


def quality_rows(report: Report) -> list[tuple[str, ...]]:
    return [
        (
            f"{x.name} to {x.against}",
            amount(x.reference, x),
            with_interval(x),
            amount(x.floor, x),
            ", ".join([*([f"changed by {change(x)}"] if change(x) else []), measured_on(x, report)]),
        )
        for x in report.quality
        if x.value is not None and plain(x.name) in HEADLINES
    ]


def plain(name: str) -> str:
    """Of a number, without whose features it looks at: `FD (mine)` is FD."""
    return name.partition(" (")[0]


def measured_on(number: Number, report: Report) -> str:
    """Without which a number cannot be compared with another one: images, sampler, calls, network, resize."""
    parts = [f"{number.n} {report.sampling.medium if report.sampling else 'images'}"]
    if report.sampling is not None:
        parts.append(f"{report.sampling.sampler}, {report.sampling.calls} calls")
    parts += [f"network {number.extractor}"] if number.extractor else []
    parts += [number.resize] if number.resize else []
    return ", ".join(parts)


def networks(report: Report) -> dict[str, list[str]]:
    """Digest of every network that measured -> the numbers that are its own."""
    found: dict[str, list[str]] = {}
    for number in report.quality:
        names = found.setdefault(number.extractor, [])
        names += [] if number.name in names else [number.name]
    return {digest: names for digest, names in found.items() if digest}


def is_own(names: Sequence[str]) -> bool:
    """Whether these are numbers of a small classifier, the package's or the user's."""
    return any(plain(name) in DISTANCES for name in names)


def distance_of(report: Report) -> Number | None:
    """By the features of a small classifier, to data rather than to the float model."""
    names = dict.fromkeys(x.name for x in report.quality if is_own([x.name]))
    found = [report.number(name, data=data) for data in (True, False) for name in names]
    return next((number for number in found if number), None)


def alone(report: Report) -> list[tuple[str, str, str]]:
    """Value, unit and meaning of what is known of images one by one."""
    meanings = {"recognised": "recognised as the class asked for", "truth": "PSNR to the nearest legal image"}
    found = {about: report.number(name, data=True) for name, about in meanings.items()}
    return [
        (f"{x.value:.1f}", x.unit, about + (f", float {x.reference:.1f}" if x.reference is not None else ""))
        for about, x in found.items()
        if x
    ]


def nearness(times: Times) -> list[tuple[int, list[tuple[str, str, bool]]]]:
    """The shown steps with their cells: a label, its colour in percent (from far to near), whether it is the nearest."""
    far, near = 1 - min(map(min, times.cosine)), max(1 - max(map(max, times.cosine)), 1e-6)
    rows = []
    for step, cosines in zip(times.shown, times.cosine):
        best = max(range(len(cosines)), key=lambda i: cosines[i])
        # Neighbouring steps differ in the fourth digit, distant ones in the first: a scale of powers shows both.
        heats = [math.log(far / max(1 - x, near)) / max(math.log(far / near), 1e-9) for x in cosines]
        cells = [
            (f"{x:.4f}", f"{100 * heat:.0f}", i == best) for i, (x, heat) in enumerate(zip(cosines, heats))
        ]
        rows.append((step, cells))
    return rows


def error_rows(report: Report) -> list[tuple[str, ...]]:
    if not report.steps:
        return []
    values = [step.relative for step in report.steps]
    label = "error of the noise prediction"
    return [
        (
            label,
            NONE,
            f"{100 * sum(values) / len(values):.2f} %",
            NONE,
            f"mean of {len(values)} steps, worst {100 * max(values):.2f} %",
        )
    ]


def share_rows(report: Report) -> list[tuple[str, ...]]:
    total = sum(row.macs for row in report.coverage)
    if not total:
        return []
    return [
        (
            "MACs in integers",
            NONE,
            f"{100 * integer_share(report):.2f} %",
            NONE,
            "of all layers and attention products",
        )
    ]


def integer_share(report: Report) -> float:
    total = sum(row.macs for row in report.coverage)
    return sum(row.macs for row in report.coverage if row.integer) / total if total else 0.0


def markdown(results: Mapping[str, Any] | Report) -> str:
    """The table for a README."""
    rows = table(results)
    lines = [markdown_row(rows[0]), "|" + "---|" * len(rows[0]), *map(markdown_row, rows[1:])]
    return "\n".join(lines) + "\n"


def markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(map(escaped, cells)) + " |"


def escaped(text: object) -> str:
    """Foreign words on one line of markdown, where they stand for nothing but themselves."""
    return re.sub(r"[\\`*<>\[\]|]", r"\\\g<0>", one_line(text))


def one_line(text: object) -> str:
    return "".join(c if c.isprintable() else " " for c in " ".join(str(text).split()))


def code(text: object, cell: bool = False) -> str:
    """Foreign words as code; in the cell of a table, which ends at every bar that is not escaped."""
    words = one_line(text)
    if cell:  # a backslash of its own before the bar would take the escape away
        words = words.replace("\\|", "\\ |").replace("|", "\\|")
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", words)), default=0))
    room = " " if words.startswith("`") or words.endswith("`") or not words else ""
    return f"{fence}{room}{words}{room}{fence}"


def with_prefix(count: float) -> str:
    """A large number in thousands, millions and so on."""
    for power, letter in ((12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if count >= 10**power:
            return f"{count / 10**power:.2f} {letter}"
    return f"{count:g}"


def megabytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count < 1e9 else f"{count / 1e9:.2f} GB"


def milliseconds(value: float | None) -> str:
    return NONE if value is None else f"{value:.1f} ms" if value < 1000 else f"{value / 1000:.2f} s"


def decimals(number: Number) -> int:
    fixed = {
        "PSNR": 1,
        "truth": 1,
        "broken": 1,
        "recognised": 1,
        "SSIM": 3,
        "structure change": 3,
        "detail": 3,
        "density": 3,
    }
    fixed |= dict.fromkeys(("precision", "recall", "coverage", "LPIPS"), 3) | {"KID": 5}
    fixed |= {distance.replace("FD", "KD"): 5 for distance in DISTANCES}
    return fixed.get(plain(number.name), 2 if abs(number.value or 0) < 100 else 1)


def amount(value: float | None, number: Number) -> str:
    if value is None:
        return NONE
    return f"{value:.{decimals(number)}f}" + (f" {number.unit}" if number.unit else "")


def change(number: Number) -> str:
    """The interval of what the integer model has more or less than the float one on the same seeds."""
    if number.change_low is None or number.change_high is None:
        return ""
    places = decimals(number)
    return f"{number.change_low:+.{places}f} to {number.change_high:+.{places}f}"


def with_interval(number: Number) -> str:
    """The value and half the width of its interval, when the interval is about symmetric."""
    if number.value is None:
        return "unavailable"
    text = amount(number.value, number)
    if number.low is None or number.high is None:
        return text
    half = max(number.high - number.value, number.value - number.low)
    value = f"{number.value:.{decimals(number)}f} ± {half:.{decimals(number)}f}"
    return value + (f" {number.unit}" if number.unit else "")
