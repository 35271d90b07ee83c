"""Feed-forwards that hand their last layer what they computed, without a cast to the dtype of its bytes."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from stepquant.models.blocks.text_feed import TextFeed
from stepquant.runtime.blocks.chain import Chain


class TextFeedForward(Chain):
    """All of its layers are called as ever."""

    def __init__(self, module: Any, declared: TextFeed) -> None:
        super().__init__(module)
        self.declared = declared

    def fused(self, hidden_states: Tensor) -> Tensor:
        module, x = self.module, hidden_states
        if self.declared.gated:
            return module.wo(module.act(module.wi_0(x)) * module.wi_1(x))  # type: ignore[no-any-return]
        return module.wo(module.act(module.wi(x)))  # type: ignore[no-any-return]
