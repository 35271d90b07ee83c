"""What the corrections share: they are fitted on the very integers that will run."""

from __future__ import annotations

import copy

from stepquant.artifact import Artifact
from stepquant.methods.method import Correction
from stepquant.models.denoiser import Denoiser
from stepquant.runtime.lower import lower


class IntegerCorrection(Correction):
    """Alone in leaning on the runtime, so that the artifacts of methods do not depend on how they run."""

    def running(self, denoiser: Denoiser, artifact: Artifact) -> Denoiser:
        return Denoiser(lower(copy.deepcopy(denoiser.model), artifact))
