"""How others name a ViT's weights: tables from our names, which are timm's, and back.

An encoder's names are timm's VisionTransformer's, a decoder's are Decoder's. A layout is recognised
by the names in it alone. Sources: facebookresearch/mae (models_mae.py), zejiangh/MILAN
(models_milan.py), hustvl/RILS (models_rils.py), open-mmlab/mmpretrain (backbones, necks),
microsoft/unilm (beit), transformers (models/vit, models/vit_mae), torchvision
(models/vision_transformer.py), mlfoundations/open_clip (transformer.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

import torch

from milan.errors import ConfigError
from milan.models.state_dict import listed

State = dict[str, torch.Tensor]
HALVES = "0.5 and 0.5"
CLIP = "open_clip's"
OPENAI_KEYS = ("input_resolution", "context_length", "vocab_size")
"""In files of OpenAI's making, beside the weights; their towers run QuickGELU."""


@dataclass(frozen=True)
class Names:
    """The names of a stack of blocks and of what stands around it."""

    outside: Mapping[str, str]
    """Our name of a tensor or module -> theirs."""
    stack: str = "blocks."
    """What precedes a block's number; ours is `blocks.`"""
    inside: Mapping[str, str] = field(default_factory=dict)
    """Our name within a block -> theirs; empty: they are ours."""
    also: Mapping[str, str] = field(default_factory=dict)
    """Other names of theirs -> ours, outside and inside: of other versions."""
    other_stack: str = ""
    """What precedes a block's number in other versions."""

    def theirs(self, ours: str) -> str | None:
        """Their name; None if they have no such part."""
        if ours.startswith("blocks."):
            _, number, rest = ours.split(".", 2)
            name = _renamed(rest, self.inside) if self.inside else rest
            return name and f"{self.stack}{number}.{name}"
        return _renamed(ours, self.outside)

    def ours(self, theirs: str) -> str | None:
        """Our name; None if it is none of this stack's."""
        stacks = "|".join(re.escape(stack) for stack in (self.stack, self.other_stack) if stack)
        block = re.match(rf"(?:{stacks})(\d+)\.(.+)", theirs)
        if block:
            back = {v: k for k, v in self.inside.items()} | dict(self.also)
            name = _renamed(block[2], back)
            name = block[2] if name is None and not self.inside else name
            return name and f"blocks.{block[1]}.{name}"
        return _renamed(theirs, {v: k for k, v in self.outside.items()} | dict(self.also))


def _renamed(name: str, table: Mapping[str, str]) -> str | None:
    """A name by a table of tensors and of modules."""
    if name in table:
        return table[name]
    module, _, tensor = name.rpartition(".")
    return f"{table[module]}.{tensor}" if module in table else None


@dataclass(frozen=True)
class Layout:
    """Whose names they are, and how they are seen."""

    title: str
    seen: str
    """The names by which it is recognised, in words."""
    matches: Callable[[Collection[str]], bool]
    encoder: Names
    decoder: Names | None = None
    before: tuple[str, ...] = ()
    """What may stand before every name of the encoder."""
    leave: tuple[str, ...] = ()
    """Beginnings of names of what is neither encoder nor decoder."""
    normalisation: str = "ImageNet's"
    """What its networks see, where the file does not say (milan.models.foreign)."""
    norm_eps: float | None = None
    """Of its networks' norms, where the file does not say; None: that of timm's ViT with such
    weights."""


_OUTSIDE = {name: name for name in (
    "cls_token", "pos_embed", "reg_token", "patch_embed.proj", "norm_pre", "norm", "fc_norm",
    "head",
)}  # fmt: skip
_GAMMAS = {"gamma_1": "ls1.gamma", "gamma_2": "ls2.gamma"}
PLAIN = Names(_OUTSIDE, also=_GAMMAS)
OFFICIAL_DECODER = Names(
    {"mask_token": "mask_token"}
    | {name: f"decoder_{name}" for name in ("pos_embed", "embed", "norm", "pred")},
    "decoder_blocks.",
    also=_GAMMAS,
)
_MMLAB_BLOCK = {
    "norm1": "ln1", "norm2": "ln2", "attn.qkv": "attn.qkv", "attn.proj": "attn.proj",
    "mlp.fc1": "ffn.layers.0.0", "mlp.fc2": "ffn.layers.1",
    "ls1.gamma": "attn.gamma1.weight", "ls2.gamma": "ffn.gamma2.weight",
}  # fmt: skip
MMLAB = Names(
    {"cls_token": "cls_token", "pos_embed": "pos_embed",
     "patch_embed.proj": "patch_embed.projection",
     "norm_pre": "pre_norm", "norm": "ln1", "fc_norm": "ln2"},
    "layers.",
    _MMLAB_BLOCK,
    {"head.fc": "head", "head.layers.head": "head"},
)  # fmt: skip
_MMLAB_DECODER = Names(
    {"mask_token": "neck.mask_token", "pos_embed": "neck.decoder_pos_embed",
     "embed": "neck.decoder_embed", "norm": "neck.ln1", "pred": "neck.decoder_pred"},
    "neck.decoder_blocks.",
    _MMLAB_BLOCK | {"attn.q": "attn.q", "attn.kv": "attn.kv"},
    {"neck.decoder_norm": "norm"},
)  # fmt: skip
_HUGGING_BLOCK = {
    "norm1": "layernorm_before", "norm2": "layernorm_after",
    "attn.q": "attention.attention.query", "attn.k": "attention.attention.key",
    "attn.v": "attention.attention.value", "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense",
}  # fmt: skip
_HUGGING_NEW = {
    "attention.q_proj": "attn.q", "attention.k_proj": "attn.k", "attention.v_proj": "attn.v",
    "attention.o_proj": "attn.proj", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2",
}  # fmt: skip
TRANSFORMERS = Names(
    {"cls_token": "embeddings.cls_token", "pos_embed": "embeddings.position_embeddings",
     "patch_embed.proj": "embeddings.patch_embeddings.projection", "norm": "layernorm",
     "head": "classifier"},
    "encoder.layer.",
    _HUGGING_BLOCK,
    _HUGGING_NEW,
    "layers.",
)  # fmt: skip
_TRANSFORMERS_DECODER = Names(
    {"mask_token": "decoder.mask_token", "pos_embed": "decoder.decoder_pos_embed",
     "embed": "decoder.decoder_embed", "norm": "decoder.decoder_norm",
     "pred": "decoder.decoder_pred"},
    "decoder.decoder_layers.",
    _HUGGING_BLOCK,
    _HUGGING_NEW,
    "decoder.decoder_encoder.layer.",  # as transformers 5 writes them
)  # fmt: skip
TORCHVISION = Names(
    {"cls_token": "class_token", "pos_embed": "encoder.pos_embedding",
     "patch_embed.proj": "conv_proj", "norm": "encoder.ln", "head": "heads.head"},
    "encoder.layers.encoder_layer_",
    {"norm1": "ln_1", "norm2": "ln_2", "attn.qkv.weight": "self_attention.in_proj_weight",
     "attn.qkv.bias": "self_attention.in_proj_bias", "attn.proj": "self_attention.out_proj",
     "mlp.fc1": "mlp.0", "mlp.fc2": "mlp.3"},
    {"mlp.linear_1": "mlp.fc1", "mlp.linear_2": "mlp.fc2"},
)  # fmt: skip
OPEN_CLIP = Names(
    {"cls_token": "visual.class_embedding", "pos_embed": "visual.positional_embedding",
     "patch_embed.proj": "visual.conv1", "norm_pre": "visual.ln_pre", "norm": "visual.ln_post"},
    "visual.transformer.resblocks.",
    {"norm1": "ln_1", "norm2": "ln_2", "attn.qkv.weight": "attn.in_proj_weight",
     "attn.qkv.bias": "attn.in_proj_bias", "attn.proj": "attn.out_proj",
     "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj", "ls1": "ls_1", "ls2": "ls_2"},
)  # fmt: skip
_TEXT = ("transformer.", "token_embedding", "positional_embedding", "ln_final", "text_projection",
         "image_projection", "logit_scale")  # fmt: skip


def _any(*parts: str) -> Callable[[Collection[str]], bool]:
    """Whether one of the names has one of `parts` in it."""
    return lambda names: any(part in name for name in names for part in parts)


LAYOUTS = (
    Layout(
        "torchvision's", "encoder.layers.encoder_layer_i", _any("encoder_layer_0."), TORCHVISION
    ),
    Layout(
        "MMPretrain's or MMSelfSup's", "layers.i.ffn, patch_embed.projection",
        _any("layers.0.ffn.layers."), MMLAB, _MMLAB_DECODER, ("backbone.",),
        ("target_generator.", "data_preprocessor.", "head.", "neck."),
    ),
    Layout(
        "transformers'", "embeddings.patch_embeddings", _any("embeddings.patch_embeddings."),
        TRANSFORMERS, _TRANSFORMERS_DECODER, ("vit.",), ("pooler.", "embeddings.mask_token"),
        HALVES, norm_eps=1e-12,
    ),
    Layout(
        "RILS's", "visual.blocks.i, text_projection", _any("visual.blocks.0."), PLAIN,
        OFFICIAL_DECODER, ("visual.",), _TEXT,
    ),
    Layout(
        CLIP, "visual.transformer.resblocks.i", _any("visual.transformer.resblocks.0."), OPEN_CLIP,
        leave=(*_TEXT, "text.", "logit_bias", "visual.proj", *OPENAI_KEYS), normalisation="CLIP's",
    ),
    Layout(
        "MILAN's", "blocks.i, decoder_blocks.j.attn.kv", _any("decoder_blocks.0.attn.kv."), PLAIN,
        OFFICIAL_DECODER,
    ),
    Layout(
        "MAE's", "blocks.i, decoder_blocks.j.attn.qkv", _any("decoder_blocks.0."), PLAIN,
        OFFICIAL_DECODER,
    ),
    Layout(
        "BEiT's", "blocks.i.attn.q_bias or blocks.i.gamma_1",
        _any("attn.q_bias", ".gamma_1", "relative_position_", "rel_pos_bias"), PLAIN,
        leave=("lm_head.", "mask_token"), normalisation=HALVES,
    ),
    Layout(
        "timm's", "blocks.i, patch_embed.proj", _any("blocks.0."), PLAIN, leave=("mask_token",)
    ),
)  # fmt: skip
"""The first that matches is taken."""


def layout_of(names: Collection[str], where: object) -> Layout:
    """The layout of a checkpoint's names. Raises ConfigError for one that is not known."""
    layout = next((one for one in LAYOUTS if one.matches(names)), None)
    if layout is None:
        raise ConfigError(
            f"{where} is in no known layout: it has {listed(names)}",
            expected="a ViT of " + ", ".join(one.title.split("'")[0] for one in LAYOUTS),
        )
    relative = [n for n in names if "relative_position_" in n or "rel_pos_" in n]
    if relative:
        raise ConfigError(
            f"{where} has relative positions ({listed(relative, 1)}), in {layout.title} layout",
            expected="absolute positions alone: a plain ViT of timm has no place for others",
            fix="weights that were trained without them, such as timm:vit_base_patch16_224.mae",
        )
    return layout


def split_up(state: State, layout: Layout, where: object) -> tuple[State, State, list[str]]:
    """(encoder, decoder, names of what is left out) of a checkpoint, under our names.

    Raises ConfigError for names that the layout does not have.
    """
    encoder: State = {}
    decoder: State = {}
    left, unknown = list[str](), list[str]()
    for name, tensor in state.items():
        short = next(
            (name[len(b) :] for b in layout.before if name.startswith(b) and len(name) > len(b)),
            name,
        )
        part = layout.decoder.ours(short) if layout.decoder else None
        if part is not None:
            decoder[part] = tensor.float()
        elif (ours := layout.encoder.ours(short)) is not None:
            encoder[ours] = tensor.float()
        elif short.startswith(layout.leave):
            left.append(name)
        else:
            unknown.append(name)
    if unknown:
        raise ConfigError(
            f"{where} has {listed(unknown)}, which {layout.title} layout does not have",
            expected="a plain ViT",
        )
    return joined(encoder), joined(decoder), left


def joined(state: State) -> State:
    """Queries, keys and values in one tensor, as timm has them; biases of BEiT too, whose keys have
    none: softmax does not see them. Class token and positions with the axis of images, which
    open_clip leaves out."""
    weights = dict(state)
    for name in {"cls_token", "pos_embed"} & state.keys():
        weights[name] = state[name].reshape(1, -1, state[name].shape[-1])
    for name in state:
        if not name.endswith(("attn.k.weight", "attn.k.bias", "attn.q_bias")):
            continue
        stem, _, leaf = name.rpartition("attn.")
        stem += "attn."
        if leaf == "q_bias":
            query, value = weights.pop(stem + "q_bias"), weights.pop(stem + "v_bias", None)
            value = torch.zeros_like(query) if value is None else value
            weights[stem + "qkv.bias"] = torch.cat([query, torch.zeros_like(query), value])
            continue
        kind = leaf.partition(".")[2]
        parts = [stem + f"{part}.{kind}" for part in "qkv"]
        if all(part in weights for part in parts):
            weights[f"{stem}qkv.{kind}"] = torch.cat([weights.pop(part) for part in parts])
    return weights


def parted(state: Mapping[str, torch.Tensor]) -> State:
    """Queries, keys and values apart, as transformers has them."""
    weights: State = {}
    for name, tensor in state.items():
        if ".attn.qkv." in name:
            stem, _, kind = name.partition("qkv.")
            for part, piece in zip("qkv", tensor.chunk(3), strict=True):
                weights[f"{stem}{part}.{kind}"] = piece.clone()
        else:
            weights[name] = tensor
    return weights


def renamed(state: Mapping[str, torch.Tensor], names: Names, before: str = "") -> State:
    """A ViT's weights under a layout's names. Raises ConfigError for parts that it lacks."""
    weights: State = {}
    for ours, tensor in state.items():
        theirs = names.theirs(ours)
        if theirs is None:
            raise ConfigError(
                f"the layout has no place for {ours}",
                expected="a plain ViT with a class token",
                fix="--format timm, which takes any ViT of timm",
            )
        weights[before + theirs] = tensor.contiguous()
    return weights
