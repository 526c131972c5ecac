"""The student: a ViT encoder over visible patches, and a decoder that predicts every token.

B views, N patches = V visible + M masked, T = 1 + N tokens with the class token first (T = N
where the encoder has none), E encoder width, D decoder width, C target width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import nn

from milan.core.device import seeded_weights
from milan.core.size import Size
from milan.models.decoder import Decoder, decoder_arguments
from milan.models.encoder import build_encoder, encode, encode_all, pooled_features
from milan.models.masking import Mask

_DEEP_BLOCKS: Final = 4  # of a deep decoder


class Student(nn.Module):
    """Encoder and decoder; only the encoder is exported.

    `recompute` (activation checkpointing): the same numbers from less memory, in more time.
    """

    def __init__(self, encoder: Any, decoder: Decoder, *, recompute: bool = False) -> None:
        super().__init__()
        self.encoder, self.decoder, self.recompute = encoder, decoder, recompute
        self.deep_decoders = nn.ModuleDict()
        """A decoder for each block of the encoder that is supervised too, by its number."""
        self.own_channels = False
        """Whether it sees other channels than the teacher's pixels."""
        self.text: nn.Module | None = None
        """A text tower that is trained along, where the objective has one."""

    @property
    def patches(self) -> int:
        """N."""
        return self.encoder.patch_embed.num_patches

    def forward(self, images: torch.Tensor, mask: Mask) -> torch.Tensor:
        """Normalised images [B, channels, H, W] to predictions [B, T, C] in the decoder's order
        (`Mask.order`, behind the class token), fewer where the mask chooses.

        With deep decoders [1 + those, B, T, C], theirs behind the decoder's (`split_deep`).
        """
        blocks = [int(number) for number in self.deep_decoders]
        latent, behind = encode_all(
            self.encoder, images, mask.visible, recompute=self.recompute, blocks=blocks
        )
        predictions = [
            decoder(self._predicting(tokens), mask, recompute=self.recompute)
            for decoder, tokens in zip(
                (self.decoder, *self.deep_decoders.values()), (latent, *behind), strict=True
            )
        ]
        return torch.stack(predictions) if behind else predictions[0]

    def _predicting(self, latent: torch.Tensor) -> torch.Tensor:
        """Tokens without registers: they are no part of the picture, nothing is predicted."""
        prefix, registers = self.encoder.num_prefix_tokens, self.encoder.num_reg_tokens
        if not registers:
            return latent
        return torch.cat([latent[:, : prefix - registers], latent[:, prefix:]], dim=1)

    def pooled_features(self, images: torch.Tensor) -> torch.Tensor:
        """What a probe sees of whole images [B, channels, H, W] (milan.models.encoder.summary)."""
        return pooled_features(self.encoder, encode(self.encoder, images))


def split_deep(output: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The decoder's prediction [B, T, C], and that of each deep decoder, in a student's output."""
    return output.unbind(0) if output.ndim == 4 else (output,)


def add_deep_decoders(student: Student, blocks: Sequence[int]) -> None:
    """Give `blocks` of the encoder, counted from 1, ascending, a decoder each.

    As DeepMIM has them (arXiv 2303.08817; models_mae.py): independent, of the decoder's kind and
    width, with 4 blocks (at most the decoder's), on what comes out of a block before any norm.
    Their weights are drawn after all others, by torch's seed.
    """
    for number in blocks:
        decoder = student.decoder.like(depth=min(_DEEP_BLOCKS, len(student.decoder.blocks)))
        _initialise_layers(decoder)
        nn.init.normal_(decoder.mask_token, std=0.02)
        student.deep_decoders[str(number)] = decoder


def build_student(
    name: str,
    *,
    img_size: Size,
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
    with seeded_weights(seed):
        vit = build_encoder(name, img_size=img_size, args=model_args)
        grid = vit.patch_embed.grid_size
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
    _initialise_layers(student)
    projection = student.encoder.patch_embed.proj
    projection.reset_parameters()
    nn.init.xavier_uniform_(projection.weight.view(projection.weight.shape[0], -1))
    encoder = student.encoder
    for token in (encoder.cls_token, encoder.reg_token, student.decoder.mask_token):
        if token is not None:
            nn.init.normal_(token, std=0.02)


def _initialise_layers(part: nn.Module) -> None:
    for module in part.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
