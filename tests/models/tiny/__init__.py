"""Tiny models of every declared class: a model, its inputs, and one other value for each input."""

from __future__ import annotations

from collections.abc import Callable

from tests.models.tiny import images, joint, sounds, unets, video_unets, videos
from tests.models.tiny.case import Case, noise
from tests.models.tiny.unets import conditional, unconditional

__all__ = ["CASES", "UNETS", "Case", "conditional", "noise", "unconditional"]

UNETS: dict[str, Callable[[], Case]] = {case.__name__: case for case in unets.CASES}
CASES = UNETS | {
    case.__name__: case for kind in (images, joint, videos, video_unets, sounds) for case in kind.CASES
}
