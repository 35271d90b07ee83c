"""SDNQ through diffusers' own backend, in the interpreter that has it: integers by the row, products in integers too.

Its licence is not ours: diffusers alone imports it, in this process, which runs nothing else.
"""

from __future__ import annotations

import torch
from diffusers import SDNQConfig

from benchmarks.engines.given import Given
from benchmarks.engines.subject import Network, Run, read, running, save


def prepare(given: Given) -> None:
    options = {}
    if given.network != "text_encoder":  # transformers has no such backend
        options["quantization_config"] = SDNQConfig(
            weights_dtype="int8",
            group_size=-1,
            quant_conv=True,
            use_quantized_matmul=True,
            use_quantized_matmul_conv=True,
        )
    save(read(given.model, given.network, **options), given.own)


def load(given: Given) -> Run:
    torch.set_num_threads(given.threads)
    return running(Network(read(given.own, given.network), given.network))
