"""RILS's student: one encoder that sees images twice, a text tower, and one projection to both.

RILS (arXiv 2301.06958; hustvl/RILS, models_rils.py). B images, N patches = V visible + M masked,
E encoder width, D joint width of images and texts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import nn

from milan.core.size import as_size, grid_of
from milan.errors import ConfigError
from milan.models.decoder import Decoder
from milan.models.encoder import build_encoder, encode
from milan.models.foreign import HEADS
from milan.models.masking import Mask
from milan.models.published import state_of
from milan.models.student import Student
from milan.models.text_encoder import TextEncoder, TextShape, caption_numbers

FIRST_SCALE = 1 / 0.07
"""exp(logit_scale) at the start (CLIP, section 2.5)."""
MOST_SCALE = 100.0
"""Its upper limit, as in CLIP and SLIP; RILS's own code has none."""
_TEXT = {
    "blocks.layers.": "transformer.resblocks.",
    ".self_attn.": ".attn.",
    ".norm1.": ".ln_1.",
    ".norm2.": ".ln_2.",
    ".linear1.": ".mlp.c_fc.",
    ".linear2.": ".mlp.c_proj.",
    "blocks.norm.": "ln_final.",
}


class JointOutput(NamedTuple):
    """What the student says of B images and their captions; nothing is normalised."""

    images: torch.Tensor
    """[B, D]: the mean of the patches of the whole image."""
    texts: torch.Tensor
    """[B, D]"""
    predicted: torch.Tensor
    """[B, M, D]: masked patches, as the decoder predicts them; M = 0 without a reconstruction."""
    target: torch.Tensor
    """[B, M, D]: the same patches, of the whole image; without gradient."""
    scale: torch.Tensor
    """Scalar: exp(logit_scale)."""
    captions: torch.Tensor
    """[B] int64: numbers of the captions, equal for equal ones (`caption_numbers`)."""


class RilsStudent(Student):
    """A Student whose decoder predicts the encoder's own features, joined to a text tower.

    The class token is in no loss: an image is the mean of its patches. One that does not
    `reconstruct` is a plain CLIP: it sees no masked image, and its decoder does not learn.
    """

    text: TextEncoder
    tokenizer = ""
    """A digest of the tokenizer whose ids the text tower reads, where it is known."""

    def __init__(
        self,
        encoder: Any,
        decoder: Decoder,
        text: TextEncoder,
        *,
        recompute: bool = False,
        reconstruct: bool = True,
    ) -> None:
        super().__init__(encoder, decoder, recompute=recompute)
        width = encoder.embed_dim
        if decoder.pred.out_features != width:
            raise ConfigError(
                f"a decoder that predicts {decoder.pred.out_features} channels",
                expected=f"the encoder's {width}, which one projection serves",
            )
        self.text, self.reconstruct = text, reconstruct
        if not reconstruct:
            decoder.requires_grad_(False)
        self.image_projection = nn.Parameter(torch.empty(width, text.shape.joint))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(FIRST_SCALE)))
        nn.init.normal_(self.image_projection, std=width**-0.5)

    def forward(self, images: torch.Tensor, mask: Mask, ids: torch.Tensor) -> JointOutput:  # type: ignore[override]
        """Normalised images [B, 3, H, W] and the token ids [B, L] of a caption each."""
        predicted = None
        if self.reconstruct:
            _, predicted = mask.split(super().forward(images, mask))
        whole = self._patches(encode(self.encoder, images, recompute=self.recompute))
        # The target comes from the same weights as the prediction, and teaches them nothing.
        target = _rows(whole.detach(), mask.decoded) @ self.image_projection.detach()
        return JointOutput(
            whole.mean(dim=1) @ self.image_projection,
            self.text(ids),
            (whole[:, :0] if predicted is None else predicted) @ self.image_projection,
            target,
            self.logit_scale.exp(),
            caption_numbers(ids),
        )

    def encode_patches(self, images: torch.Tensor) -> torch.Tensor:
        """[B, N, D], not normalised: each patch of whole images; an image is their mean."""
        return self._patches(encode(self.encoder, images)) @ self.image_projection

    def pooled_features(self, images: torch.Tensor) -> torch.Tensor:
        """The mean of patches [B, E]: the class token was never trained."""
        return self._patches(encode(self.encoder, images)).mean(dim=1)

    def _patches(self, tokens: torch.Tensor) -> torch.Tensor:
        """[B, N, E] of tokens with or without what stands before the patches."""
        return tokens[:, -self.patches :]

    @torch.no_grad()
    def clamp_scale(self) -> None:
        """After a step: the scale of the contrastive loss is kept between 1 and MOST_SCALE."""
        self.logit_scale.clamp_(0, math.log(MOST_SCALE))


def _rows(tokens: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """Rows `at` [B, M] of tokens [B, N, E]: [B, M, E]."""
    return tokens.gather(1, at[..., None].expand(-1, -1, tokens.shape[2]))


def rils_decoder(width: int, heads: int) -> dict[str, Any]:
    """RILS's decoder for an encoder of that width and as many heads: one plain block as wide."""
    return {"embed_dim": width, "depth": 1, "num_heads": heads, "mlp_ratio": 4.0}


# --- the published layout -------------------------------------------------------------------------


def published_name(ours: str) -> str:
    """The name in RILS's checkpoints of one of our parameters, qkv biases apart."""
    part, _, rest = ours.partition(".")
    if part == "encoder":
        return "visual." + rest
    if part == "decoder":
        return "visual." + (rest if rest == "mask_token" else "decoder_" + rest)
    if part == "text":
        for mine, theirs in _TEXT.items():
            rest = rest.replace(mine, theirs)
        return "text_projection" if rest == "projection" else rest
    return ours


def published_shape(student: RilsStudent) -> dict[str, str]:
    """What weights under RILS's names do not tell, for the header of their file."""
    shape = {
        "heads": student.encoder.blocks[0].attn.num_heads,
        "decoder_heads": student.decoder.arguments["num_heads"],
        "text_heads": student.text.shape.heads,
        "quick_gelu": student.text.shape.quick_gelu,
        "tokenizer": student.tokenizer,
    }
    rows, columns = student.encoder.patch_embed.grid_size
    if rows != columns:  # what a number of positions does not tell
        shape["grid"] = [rows, columns]
    return {name: json.dumps(value) for name, value in shape.items()}


def published_state(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights of a RilsStudent, by name, under RILS's names.

    RILS has no bias of keys: softmax does not see it, so what is left out changes no output.
    """
    state: dict[str, torch.Tensor] = {}
    for ours, value in weights.items():
        name = published_name(ours)
        if name.endswith("attn.qkv.bias"):
            query, _, values = value.chunk(3)
            stem = name.removesuffix("qkv.bias")
            state |= {f"{stem}q_bias": query.clone(), f"{stem}v_bias": values.clone()}
        else:
            state[name] = value
    return state


def load_rils(source: str | Path | Mapping[str, Any]) -> RilsStudent:
    """A student with the weights of a checkpoint in RILS's layout, in eval mode.

    `source`: a file (.pt, .pth, .safetensors), or a state dict. Sizes are read off the weights;
    heads, which are not in them, are those of the file's header (`published_shape`), else 64
    channels wide. Raises ConfigError if they do not fit.
    """
    try:
        state = state_of(source)
        shape = _header(source)
        student = _of_shape(state, shape)
        student.tokenizer = shape.get("tokenizer", "")
        theirs: dict[str, torch.Tensor] = {}
        used = set[str]()
        for ours in student.state_dict():
            name = published_name(ours)
            names = [name]
            if name.endswith("attn.qkv.bias"):
                stem = name.removesuffix("qkv.bias")
                names = [f"{stem}q_bias", f"{stem}v_bias"]
                query, values = (state[n] for n in names)
                theirs[ours] = torch.cat([query, torch.zeros_like(query), values])
            else:
                theirs[ours] = state[name]
            used.update(names)
        if unknown := sorted(state.keys() - used):
            raise ValueError(f"it has {unknown[0]}")
        student.load_state_dict(theirs, strict=True)
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        missing = "it has no " if isinstance(error, KeyError) else ""
        first = missing + str(error).strip().splitlines()[-1].strip()[:200]
        raise ConfigError(
            f"the checkpoint is not in RILS's published layout: {first}",
            expected="visual.patch_embed.proj, visual.blocks.i…, transformer.resblocks.j…, "
            "image_projection, text_projection, logit_scale",
        ) from None
    return student.eval()


def load_text_tower(source: str | Path, usual: TextShape) -> TextEncoder:
    """The text tower in a checkpoint of RILS or of open_clip (.pt, .pth, .safetensors).

    Sizes are read off the weights. Heads and activation are those of a header of ours, else those
    of `usual` if that is as wide, else CLIP's. Raises ConfigError if it has none that fits.
    """
    try:
        shape = _header(source)
        state = {n.removeprefix("text."): value.float() for n, value in state_of(source).items()}
        if not shape and state["positional_embedding"].shape[1] == usual.width:
            shape = {"text_heads": usual.heads, "quick_gelu": usual.quick_gelu}
        tower = TextEncoder(_text_shape(state, shape))
        theirs = {name: state[published_name(f"text.{name}")] for name in tower.state_dict()}
        tower.load_state_dict(theirs, strict=True)
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        missing = "it has no " if isinstance(error, KeyError) else ""
        first = missing + str(error).strip().splitlines()[-1].strip()[:200]
        raise ConfigError(
            f"no text tower of CLIP's shape in {source}: {first}",
            expected="token_embedding, transformer.resblocks.j…, ln_final, text_projection",
        ) from None
    return tower


def _header(source: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    """What `published_shape` wrote; empty for what others wrote."""
    if not isinstance(source, str | Path) or Path(source).suffix != ".safetensors":
        return {}
    with safe_open(source, framework="pt") as file:
        about = file.metadata() or {}
    return {name: json.loads(value) for name, value in about.items()} if "heads" in about else {}


def _of_shape(state: Mapping[str, torch.Tensor], shape: Mapping[str, Any]) -> RilsStudent:
    """A student of the sizes of a published state dict, and of what its header says."""
    width, _, patch, _ = state["visual.patch_embed.proj.weight"].shape
    rows, columns = shape.get("grid") or grid_of(state["visual.pos_embed"].shape[1] - 1, 1)
    hidden = state["visual.blocks.0.mlp.fc1.weight"].shape[0]
    heads = shape.get("heads", HEADS.get(width, max(1, width // 64)))
    encoder = build_encoder(
        "vit_base_patch16_224",
        img_size=as_size((rows * patch, columns * patch)),
        args={
            "patch_size": patch,
            "embed_dim": width,
            "depth": _count(state, "visual.blocks."),
            "num_heads": heads,
            "mlp_ratio": hidden / width,
        },
    )
    decoder_width = state["visual.decoder_embed.weight"].shape[0]
    usual = HEADS.get(decoder_width, max(1, decoder_width // 64))
    arguments = rils_decoder(decoder_width, shape.get("decoder_heads", usual))
    arguments["depth"] = _count(state, "visual.decoder_blocks.")
    arguments["mlp_ratio"] = (
        state["visual.decoder_blocks.0.mlp.fc1.weight"].shape[0] / decoder_width
    )
    decoder = Decoder(
        "mae",
        encoder_width=width,
        grid=(rows, columns),
        target_width=state["visual.decoder_pred.weight"].shape[0],
        **arguments,
    )
    return RilsStudent(encoder, decoder, TextEncoder(_text_shape(state, shape)))


def _text_shape(state: Mapping[str, torch.Tensor], shape: Mapping[str, Any]) -> TextShape:
    """The sizes of a text tower."""
    vocabulary, width = state["token_embedding.weight"].shape
    return TextShape(
        vocabulary=vocabulary,
        context=state["positional_embedding"].shape[0],
        width=width,
        heads=shape.get("text_heads", max(1, width // 64)),
        layers=_count(state, "transformer.resblocks."),
        joint=state["text_projection"].shape[1],
        quick_gelu=shape.get("quick_gelu", True),
    )


def _count(state: Mapping[str, torch.Tensor], stack: str) -> int:
    """How many blocks a stack has."""
    place = stack.count(".")
    return 1 + max(int(name.split(".")[place]) for name in state if name.startswith(stack))
