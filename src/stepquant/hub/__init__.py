"""The bridge to diffusers and transformers: what `save_pretrained` writes and `from_pretrained` loads."""

from stepquant.hub.attach import attach, check_folder, config_of, keep_in_float
from stepquant.hub.config import KEYS, StepquantConfig, digests_of, settings_digest
from stepquant.hub.of_diffusers import StepquantQuantizer

__all__ = [
    "KEYS",
    "StepquantConfig",
    "StepquantQuantizer",
    "attach",
    "check_folder",
    "config_of",
    "digests_of",
    "keep_in_float",
    "settings_digest",
]
