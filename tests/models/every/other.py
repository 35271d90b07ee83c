"""What makes neither pictures nor sound alone: embeddings, molecules, an image together with its words."""

from __future__ import annotations

import diffusers
import torch

from tests.models.every.build import TEXT, Case, noise, text, times


def prior() -> Case:
    model = diffusers.PriorTransformer(num_attention_heads=2, attention_head_dim=16, num_layers=2, embedding_dim=32,
                                       num_embeddings=TEXT)  # fmt: skip
    return model, {
        "hidden_states": noise(2, 32),
        "timestep": times(),
        "proj_embedding": noise(2, 32),
        **text(32),
    }


def proteina() -> Case:
    model = diffusers.RFD4ProteinaTransformer(
        nlayers=2, token_dim=32, nheads=2, dim_cond=32, pair_repr_dim=16, latent_dim=8, token_type_emb_dim=16,
        cath_emb_dim=16, t_emb_dim=16, seq_sep_dim=16, xt_pair_dist_dim=16, tri_mult_c=16,
        feats_seq=("xt_bb_ca", "xt_local_latents", "token_type"), feats_pair_repr=("xt_bb_ca_pair_dists",),
        feats_cond_seq=("time_emb_bb_ca", "time_emb_local_latents"), num_sequence_classes=16)  # fmt: skip
    real = torch.ones(2, 6, dtype=torch.bool)
    known = {"is_in_context_conditioning": torch.zeros(2, 6, dtype=torch.bool), "supports_local_latent": real}
    return model, {"bb_ca": noise(2, 6, 3), "local_latents": noise(2, 6, 8), "bb_ca_time": times(1),
                   "local_latents_time": times(1), "padding_mask": real, "token_type": torch.randint(7, (2, 6)),
                   "conditioning": known}  # fmt: skip


def uni_diffuser() -> Case:
    model = diffusers.UniDiffuserModel(
        text_dim=32, clip_img_dim=32, num_text_tokens=TEXT, num_attention_heads=2, attention_head_dim=16, in_channels=4,
        out_channels=4, num_layers=2, attention_bias=True, sample_size=8, patch_size=2, activation_fn="gelu",
        num_embeds_ada_norm=1000, norm_elementwise_affine=True)  # fmt: skip
    return model, {"latent_image_embeds": noise(2, 4, 8, 8), "image_embeds": noise(2, 1, 32),
                   "prompt_embeds": noise(2, TEXT, 32), "timestep_img": times(), "timestep_text": times()}  # fmt: skip


OTHER = {"PriorTransformer": prior, "RFD4ProteinaTransformer": proteina, "UniDiffuserModel": uni_diffuser}
