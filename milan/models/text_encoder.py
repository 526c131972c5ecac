"""A text tower of CLIP's shape, to be trained: token ids become vectors in the space of images.

B texts, L token ids each (at most the context), w width of the tower, D joint width. The end of a
text is its highest id, as in CLIP's vocabulary, where it is the last one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from milan.core.device import device_constant
from milan.errors import ConfigError


@dataclass(frozen=True)
class TextShape:
    """The sizes of a text tower; those of RILS's ViT-B/16 by default (models_rils.py)."""

    vocabulary: int = 49_408
    context: int = 77
    """Token ids of a text, at most."""
    width: int = 512
    heads: int = 8
    layers: int = 12
    joint: int = 512
    """D, which images are projected to as well."""
    quick_gelu: bool = True

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ConfigError(
                f"a text tower of width {self.width} with {self.heads} heads",
                expected="a width that the heads divide",
            )


def quick_gelu(x: torch.Tensor) -> torch.Tensor:
    """x · sigmoid(1.702 x): the activation of OpenAI's CLIP."""
    return x * torch.sigmoid(1.702 * x)


class TextEncoder(nn.Module):
    """A causal transformer; a text is what it says at its end, projected (CLIP, section 2.4)."""

    def __init__(self, shape: TextShape) -> None:
        super().__init__()
        self.shape = shape
        self.token_embedding = nn.Embedding(shape.vocabulary, shape.width)
        self.positional_embedding = nn.Parameter(torch.empty(shape.context, shape.width))
        layer = nn.TransformerEncoderLayer(
            shape.width,
            shape.heads,
            dim_feedforward=4 * shape.width,
            dropout=0.0,
            activation=quick_gelu if shape.quick_gelu else nn.functional.gelu,
            batch_first=True,
            norm_first=True,
        )
        self.blocks = nn.TransformerEncoder(
            layer, shape.layers, norm=nn.LayerNorm(shape.width), enable_nested_tensor=False
        )
        self.projection = nn.Parameter(torch.empty(shape.width, shape.joint))
        self.initialise()

    def initialise(self) -> None:
        """CLIP's initial weights (SLIP's models.py, initialize_parameters, has the same)."""
        layers: Any = self.blocks.layers
        width, inner = self.shape.width**-0.5, (2 * len(layers)) ** -0.5
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        nn.init.normal_(self.projection, std=width)
        for layer in layers:
            layer.linear1.reset_parameters()  # biases: the layers are copies of one
            layer.linear2.reset_parameters()
            nn.init.normal_(layer.self_attn.in_proj_weight, std=width)
            nn.init.normal_(layer.self_attn.out_proj.weight, std=width * inner)
            nn.init.normal_(layer.linear1.weight, std=(2 * self.shape.width) ** -0.5)
            nn.init.normal_(layer.linear2.weight, std=width * inner)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Token ids [B, L] of any integer type to vectors [B, D], not normalised."""
        ids = ids.long()
        x = self.token_embedding(ids) + self.positional_embedding[: ids.shape[1]]
        causal = nn.Transformer.generate_square_subsequent_mask(ids.shape[1], device=ids.device)
        x = self.blocks(x, mask=causal, is_causal=True)
        ends = ids.argmax(dim=1)  # the first of the highest
        return x[torch.arange(len(ids), device=ids.device), ends] @ self.projection


def caption_numbers(ids: torch.Tensor) -> torch.Tensor:
    """[b] int64 of token ids [b, L]: equal captions have equal numbers, others different ones."""
    return ((ids.long() + 1) * _powers(ids.device, ids.shape[1])).sum(dim=1)


@device_constant
def _powers(length: int) -> torch.Tensor:
    """[length] int64: powers of an odd number modulo 2^64, as a polynomial hash has them."""
    return torch.full((length,), 6364136223846793005).cumprod(dim=0)
