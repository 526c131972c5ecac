"""The student: a ViT encoder over visible patches, and a decoder that predicts every token.

B views, N patches = V visible + M masked, T = 1 + N tokens with the class token first (T = N
where the encoder has none), E encoder width, D decoder width, C target width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from milan.models.decoder import Decoder, decoder_arguments
from milan.models.encoder import build_encoder, encode, pooled_features
from milan.models.masking import Mask


class Student(nn.Module):
    """Encoder and decoder; only the encoder is exported.

    `recompute` (activation checkpointing): the same numbers from less memory, in more time.
    """

    def __init__(self, encoder: Any, decoder: Decoder, *, recompute: bool = False) -> None:
        super().__init__()
        self.encoder, self.decoder, self.recompute = encoder, decoder, recompute
        self.text: nn.Module | None = None
        """A text tower that is trained along, where the objective has one."""

    @property
    def patches(self) -> int:
        """N."""
        return self.encoder.patch_embed.num_patches

    def forward(self, images: torch.Tensor, mask: Mask) -> torch.Tensor:
        """Normalised images [B, 3, S, S] to predictions [B, T, C], fewer where the mask chooses."""
        latent = encode(self.encoder, images, mask.visible, recompute=self.recompute)
        prefix, registers = self.encoder.num_prefix_tokens, self.encoder.num_reg_tokens
        if registers:  # they are no part of the picture: nothing is predicted from them
            latent = torch.cat([latent[:, : prefix - registers], latent[:, prefix:]], dim=1)
        return self.decoder(latent, mask, recompute=self.recompute)

    def pooled_features(self, images: torch.Tensor) -> torch.Tensor:
        """What a probe sees of whole images [B, 3, S, S] (milan.models.encoder.summary)."""
        return pooled_features(self.encoder, encode(self.encoder, images))


def build_student(
    name: str,
    *,
    img_size: int,
    target_width: int | Sequence[int] | Callable[[Any], int | Sequence[int]],
    decoder_kind: str = "prompt",
    model_args: dict[str, Any] | None = None,
    decoder: dict[str, Any] | Callable[[Any], dict[str, Any]] | None = None,
    seed: int = 0,
    recompute: bool = False,
    complete: Callable[[Student], Student] | None = None,
) -> Student:
    """A student with the published initial weights, the same for the same seed.

    `model_args` override the arguments of the encoder (timm's), `decoder` those of
    `decoder_arguments`. The target's width may follow from the encoder, and all arguments of the
    decoder; `complete` adds parts. Raises ConfigError.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vit = build_encoder(name, img_size=img_size, args=model_args)
        grid = vit.patch_embed.grid_size[0]
        head = Decoder(
            decoder_kind,
            encoder_width=vit.embed_dim,
            grid=grid,
            target_width=target_width(vit) if callable(target_width) else target_width,
            class_token=vit.has_class_token,
            **(decoder(vit) if callable(decoder) else decoder_arguments(vit.embed_dim, decoder)),
        )
        student = Student(vit, head, recompute=recompute)
        initialise(student)
        if complete:
            student = complete(student)
    return student


def initialise(student: Student) -> None:
    """MAE's initial weights, which MILAN keeps (models_milan.py, initialize_weights).

    Linear layers Xavier-uniform with zero bias, norms 1 and 0, tokens N(0, 0.02), the patch
    embedding Xavier-uniform as a matrix, its bias as torch makes it. Positions are not touched.
    """
    for module in student.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
    projection = student.encoder.patch_embed.proj
    projection.reset_parameters()
    nn.init.xavier_uniform_(projection.weight.view(projection.weight.shape[0], -1))
    encoder = student.encoder
    for token in (encoder.cls_token, encoder.reg_token, student.decoder.mask_token):
        if token is not None:
            nn.init.normal_(token, std=0.02)
