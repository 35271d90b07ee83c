"""Fused blocks of an image and a text, each with norms, layers and gates of its own."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from stepquant.runtime.blocks.modulated import Branch, Modulated, Modulation, made, normed


def asks(*values: Any) -> bool:
    """Whether one of the arguments that a block may have says something."""
    return any(isinstance(value, Tensor) or bool(value) for value in values)


class Joint(Modulated):
    """An image and a text beside each other, joined in one attention."""

    from_start = False  # whether feed-forwards join what the block was given

    def fused(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor | None, Tensor]:
        x, text, block = hidden_states, encoder_hidden_states, self.module
        others = {name: value for name, value in kwargs.items() if name != "image_rotary_emb"}
        if args or asks(*others.values()) or self.leaves_out(x):
            return self.unfused(x, text, temb, *args, **kwargs)  # type: ignore[no-any-return]
        rotary = {name: value for name, value in kwargs.items() if name == "image_rotary_emb"}
        if not getattr(block, "context_pre_only", False):
            return self.streams(x, text, *self.modulations(temb), self.norms(), **rotary)
        of_image = made(block.norm1, temb, 9 if self.attentions[1:] else 6)
        norms = block.norm1.norm, block.norm2, None
        return self.streams(x, block.norm1_context(text, temb), of_image, None, norms, **rotary)

    def modulations(self, temb: Tensor) -> tuple[Modulation, Modulation]:
        """Shift, scale and gate of each branch, of the image and of the text."""
        block = self.module
        return made(block.norm1, temb, 9 if self.attentions[1:] else 6), made(block.norm1_context, temb, 6)

    def norms(self) -> tuple[Any, ...]:
        """Before attention and feed-forward, of the image and of the text."""
        block = self.module
        return block.norm1.norm, block.norm2, block.norm1_context.norm, block.norm2_context

    def streams(
        self,
        x: Tensor,
        text: Tensor,
        of_image: Modulation,
        of_text: Modulation | None,
        norms: tuple[Any, ...],
        **kwargs: Any,
    ) -> tuple[Tensor | None, Tensor]:
        """Both behind attention and feed-forward; a text that nothing follows from any more is normed already."""
        joint, *dual = self.attentions
        onto = (x, text) if self.from_start else (None, None)
        shift, scale, gate = of_image[:3]
        rows = normed(x, norms[0], joint.code(), scale, shift)
        again = normed(x, norms[0], dual[0].code(), of_image[7], of_image[6]) if dual else None
        words = text
        if of_text is not None:
            words = normed(text, norms[2], joint.code(1), of_text[1], of_text[0])
            joint.ends["to_add_out"].streams = ((text, of_text[2]),)
        joint.shared[-1].dtype = text.dtype
        x, text = self.attended(joint, rows, x, gate, encoder_hidden_states=words, **kwargs)
        if again is not None:
            x = self.attended(dual[0], again, x, of_image[8])
        x = self.fed(self.feeds[0], x, Branch(norms[1], of_image[3:6]), onto[0])
        if of_text is None:
            return None, x
        return self.fed(self.feeds[1], text, Branch(norms[3], of_text[3:6]), onto[1]), x


class JointStart(Joint):
    """The same, whose feed-forwards join what the block was given."""

    from_start = True


class Behind(Joint):
    """The text stands behind the image, under a mask."""

    def fused(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        x, text, mask = hidden_states, encoder_hidden_states, attention_mask
        if kwargs or self.leaves_out(x):
            return self.unfused(x, text, temb, mask, image_rotary_emb, *args, **kwargs)  # type: ignore[no-any-return]
        given = {"attention_mask": mask, "image_rotary_emb": image_rotary_emb}
        text, x = self.streams(x, text, *self.modulations(temb), self.norms(), **given)  # type: ignore[assignment]
        return x, text


class Pruned(Joint):
    """What follows t is made for all blocks at once, and each is handed its rows."""

    def fused(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: Any = None,
        attention_mask: Tensor | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor | None, Tensor]:
        x, text, mask = hidden_states, encoder_hidden_states, attention_mask
        if joint_attention_kwargs or self.leaves_out(x):
            return self.unfused(x, text, temb, image_rotary_emb, mask, joint_attention_kwargs)  # type: ignore[no-any-return]
        of_image, of_text = temb[:, :6].unbind(1), temb[:, 6:].unbind(1)
        given = {"attention_mask": of_pairs(mask), "image_rotary_emb": image_rotary_emb}
        return self.streams(x, text, of_image, of_text, self.norms(), **given)


class Given(Joint):
    """All blocks share what follows t."""

    def fused(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb_mod_img: Tensor,
        temb_mod_txt: Tensor,
        image_rotary_emb: Any = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor | None, Tensor]:
        x, text, both = hidden_states, encoder_hidden_states, (temb_mod_img, temb_mod_txt)
        if joint_attention_kwargs or any(map(by_token, both)) or self.leaves_out(x):
            return self.unfused(x, text, *both, image_rotary_emb, joint_attention_kwargs)  # type: ignore[no-any-return]
        of_image, of_text = (one.flatten(1).chunk(6, dim=1) for one in both)
        return self.streams(x, text, of_image, of_text, self.norms(), image_rotary_emb=image_rotary_emb)

    def norms(self) -> tuple[Any, ...]:
        block = self.module
        return block.norm1, block.norm2, block.norm1_context, block.norm2_context


class Named(Joint):
    """The same with names of its own."""

    def fused(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_mask: Tensor | None,
        temb: Tensor,
        image_rotary_emb: Any = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        modulate_index: Any = None,
    ) -> tuple[Tensor | None, Tensor]:
        x, text, block, mask = hidden_states, encoder_hidden_states, self.module, encoder_hidden_states_mask
        extra = joint_attention_kwargs or modulate_index is not None or block.zero_cond_t
        if extra or self.leaves_out(x):
            others = joint_attention_kwargs, modulate_index
            return self.unfused(x, text, mask, temb, image_rotary_emb, *others)  # type: ignore[no-any-return]
        of_image, of_text = (modulate(temb).chunk(6, dim=1) for modulate in (block.img_mod, block.txt_mod))
        norms = block.img_norm1, block.img_norm2, block.txt_norm1, block.txt_norm2
        given = {"encoder_hidden_states_mask": mask, "image_rotary_emb": image_rotary_emb}
        return self.streams(x, text, of_image, of_text, norms, **given)


JOINT: dict[str, type[Modulated]] = {
    "joint": Joint,
    "joint_start": JointStart,
    "behind": Behind,
    "pruned": Pruned,
    "given": Given,
    "named": Named,
}


def of_pairs(mask: Tensor | None) -> Tensor | None:
    """A mask of tokens as one of queries and keys."""
    return None if mask is None else mask[:, None, None, :] * mask[:, None, :, None]


def by_token(modulation: Tensor) -> bool:
    """Whether t is one number for each token instead of one for each sample."""
    return modulation.dim() == 3 and modulation.shape[1] != 1
