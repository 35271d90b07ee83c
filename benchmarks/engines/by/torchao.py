"""torchao's PT2E with the quantizer for x86: static INT8 through torch.compile."""

from __future__ import annotations

import torch

from benchmarks.engines.by.eager import frozen
from benchmarks.engines.given import Given
from benchmarks.engines.subject import Network, Run, read, running, tensors

FILE = "network.pt2"


def prepare(given: Given) -> None:
    import torchao.quantization.pt2e.quantizer.x86_inductor_quantizer as x86
    from torchao.quantization.pt2e import move_exported_model_to_eval
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    calls = [tuple(tensors(call)) for call in given.calls()]
    with torch.no_grad():
        traced = torch.export.export(
            Network(read(given.model, given.network), given.network), calls[0], strict=False
        )
        quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
        observed = prepare_pt2e(traced.module(), quantizer)
        del traced
        for call in calls:
            observed(*call)
        made = move_exported_model_to_eval(convert_pt2e(observed))
        given.own.mkdir(parents=True)
        torch.export.save(torch.export.export(made, calls[0], strict=False), given.own / FILE)
    load(given)(given.calls()[0])  # what it compiles is kept


def load(given: Given) -> Run:
    import torchao.quantization.pt2e.quantizer.x86_inductor_quantizer  # noqa: F401 - its operations

    torch.set_num_threads(given.threads)
    model = torch.export.load(given.own / FILE).module()
    return running(frozen(given, model))
