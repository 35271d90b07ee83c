"""Errors of stepquant: each says what failed, where, what was found, what would be accepted and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class StepquantError(Exception):
    """Something in the user's input that stepquant cannot go on with. The command line exits with 2."""

    def __init__(
        self,
        what: str,
        *,
        where: str | None = None,
        got: object = None,
        expected: object = None,
        fix: str | None = None,
    ) -> None:
        self.what, self.where, self.got, self.expected, self.fix = what, where, got, expected, fix
        lines = [what]
        lines += [
            f"  {label}: {value}"
            for label, value in (("where", where), ("got", got), ("expected", expected), ("do", fix))
            if value is not None
        ]
        super().__init__("\n".join(lines))


class UnknownNameError(StepquantError):
    """A name that nothing carries; the nearest known names are offered."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        names = sorted(known)
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
        super().__init__(
            f"unknown {kind} '{name}'",
            expected=", ".join(names),
            fix=f"did you mean {' or '.join(repr(n) for n in near)}?" if near else None,
        )


class ModelError(StepquantError):
    """A model or pipeline that stepquant cannot take."""


class ProductError(ModelError):
    """An attention, named by `where`, whose product no integers can take the place of."""


class PlanError(StepquantError):
    """A plan with a rule that matches nothing, a site without a rule, or a grid a site cannot carry."""


class CalibrationError(StepquantError):
    """Calibration data that is missing, foreign or not finite."""


class RangeError(StepquantError):
    """A quantizer without a range, or a range that is not finite."""


class ArtifactError(StepquantError):
    """A folder that is no intact artifact."""


class MethodError(StepquantError):
    """A method, or one of its fields, that does not fit the model or the data."""


class RuntimeSupportError(StepquantError):
    """Something the integer runtime cannot do on this machine."""


class EvaluationError(StepquantError):
    """A metric that cannot be measured on what it was given."""
