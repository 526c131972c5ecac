"""Checkpoints of others: each layout by its own names, nothing of them run, nothing half loaded."""

from __future__ import annotations

import argparse
import builtins
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Notes, published
from safetensors.torch import load_file, save_file

from milan.config import PretrainConfig
from milan.core.device import normalise
from milan.core.paths import LFS_POINTER
from milan.errors import ConfigError
from milan.evaluation.config import EvaluationConfig
from milan.evaluation.frozen import frozen_encoder
from milan.models.detector import Detector, DetectorSpec, detector_encoder, interpolated
from milan.models.encoder import create_vit
from milan.models.foreign import read_foreign
from milan.models.student import Student, build_student
from milan.training.initial import initialise_from
from milan.training.supervised import load_weights
from pipeline.teachers.load import load_teacher
from pipeline.teachers.spec import TeacherSpec

VIT = "vit_base_patch16_224"
ARGS = {"patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 1}
DECODER = {"embed_dim": 32, "depth": 1, "num_heads": 2}
State = dict[str, torch.Tensor]


def student(kind: str = "prompt", seed: int = 1, size: int = 32, **args: Any) -> Student:
    """Every weight differs from every other, or a wrong name could not show."""
    made = build_student(
        VIT, img_size=size, target_width=24, decoder_kind=kind, model_args=ARGS | args,
        decoder=DECODER, seed=seed,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    for parameter in made.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    return made


def replaced(state: State, *pairs: tuple[str, str]) -> State:
    """Names after all replacements, in order."""
    found = {}
    for name, tensor in state.items():
        for pattern, new in pairs:
            name = re.sub(pattern, new, name)
        found[name] = tensor
    return found


def without_key_bias(state: State) -> State:
    """q_bias and v_bias, as BEiT and RILS have them."""
    found = {}
    for name, tensor in state.items():
        if name.endswith("attn.qkv.bias"):
            query, _, value = tensor.chunk(3)
            stem = name.removesuffix("qkv.bias")
            found |= {f"{stem}q_bias": query.clone(), f"{stem}v_bias": value.clone()}
        else:
            found[name] = tensor
    return found


MM = (
    (r"^(decoder_)?blocks\.(\d+)\.", r"\1layers.\2."),
    (r"norm1", "ln1"), (r"norm2", "ln2"), (r"mlp\.fc1", "ffn.layers.0.0"),
    (r"mlp\.fc2", "ffn.layers.1"), (r"^norm\.", "ln1."),
    (r"patch_embed\.proj", "patch_embed.projection"),
    (r"^decoder_norm\.", "neck.ln1."), (r"^decoder_layers", "neck.decoder_blocks"),
    (r"^(decoder_|mask_token)", r"neck.\1"), (r"^(?!neck)", "backbone."),
)  # fmt: skip
HUGGING = (
    (r"^blocks\.", "encoder.layer."), (r"^decoder_blocks\.", "decoder.decoder_layers."),
    (r"norm1", "layernorm_before"), (r"norm2", "layernorm_after"),
    (r"attn\.q\.", "attention.attention.query."), (r"attn\.k\.", "attention.attention.key."),
    (r"attn\.v\.", "attention.attention.value."),
    (r"attn\.proj", "attention.output.dense"), (r"mlp\.fc1", "intermediate.dense"),
    (r"mlp\.fc2", "output.dense"), (r"^norm\.", "layernorm."),
    (r"^(cls_token)", r"embeddings.\1"), (r"^pos_embed", "embeddings.position_embeddings"),
    (r"^patch_embed\.proj", "embeddings.patch_embeddings.projection"),
    (r"^(mask_token|decoder_)", r"decoder.\1"), (r"^(?!decoder)", "vit."),
)  # fmt: skip


def apart(state: State) -> State:
    """Queries, keys and values of transformers."""
    found = {}
    for name, tensor in state.items():
        if "attn.qkv" in name:
            parts = zip("qkv", tensor.chunk(3), strict=True)
            found |= {name.replace("qkv", part): piece.clone() for part, piece in parts}
        else:
            found[name] = tensor
    return found


# layout -> (kind of decoder, from the official names to its own, how the error and note call it)
LAYOUTS: dict[str, tuple[str, Callable[[State], State], str]] = {
    "MILAN": ("prompt", lambda s: s, "in MILAN's layout (blocks.i, decoder_blocks.j.attn.kv)"),
    "MAE": ("mae", lambda s: s, "in MAE's layout"),
    "MMLab": ("prompt", lambda s: replaced(s, *MM), "in MMPretrain's or MMSelfSup's layout"),
    "MMLab's MAE": ("mae", lambda s: replaced(s, *MM), "in MMPretrain's or MMSelfSup's layout"),
    "ViTMAE": ("mae", lambda s: replaced(apart(s), *HUGGING), "in transformers' layout"),
    "RILS": (
        "mae",
        lambda s: (
            {f"visual.{k}": v for k, v in without_key_bias(s).items()}
            | {
                "text_projection": torch.ones(2, 2),
                "transformer.resblocks.0.ln_1.bias": torch.ones(2),
            }
        ),
        "in RILS's layout",
    ),
    "BEiT": ("", lambda s: without_key_bias(s) | {"lm_head.bias": torch.ones(3)}, "in BEiT's"),
    "timm": ("", lambda s: s | {"head.weight": torch.ones(3, 64)}, "in timm's layout"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, tmp_path: Path) -> None:
    """All weights of encoder and decoder arrive, by --init; features are the encoder's, by
    --checkpoint; what is left out and what else is in the file is named."""
    kind, names, title = LAYOUTS[layout]
    whole = student(kind or "prompt")
    keyless = layout in ("RILS", "BEiT")
    if keyless:  # their keys have none
        for name, parameter in whole.named_parameters():
            if name.endswith("attn.qkv.bias"):
                third = len(parameter) // 3
                parameter.data[third : 2 * third] = 0
    state = published(whole)
    if not kind:
        state = {k: v for k, v in state.items() if not k.startswith(("decoder", "mask_token"))}
    path = tmp_path / "weights.pth"
    command_line = argparse.Namespace(model="mae_vit", lr=1e-3)
    torch.save({"model": names(state), "epoch": 799, "args": command_line}, path)

    found, notes = student(kind or "prompt", seed=2), Notes()
    config = PretrainConfig(model=VIT, init=str(path))
    before = found.decoder.pred.weight.clone()
    initialise_from(config, found, notes)
    said = notes.line(str(path))
    assert title in said
    assert "also in the file: epoch 799, args (argparse.Namespace)" in said
    if layout == "BEiT":  # its pixels have another normalisation, which is folded in
        assert "0.5 and 0.5 assumed" in said
        assert "lm_head.bias" in said
    elif layout == "timm":
        assert "left out: head.weight" in said
    for name, tensor in whole.encoder.state_dict().items():
        if layout not in ("BEiT", "ViTMAE") or not name.startswith("patch_embed"):
            assert torch.equal(found.encoder.state_dict()[name], tensor), name
    for name, tensor in whole.decoder.state_dict().items():
        if kind:
            assert torch.equal(found.decoder.state_dict()[name], tensor), name
    assert torch.equal(found.decoder.pred.weight, before) != bool(kind)

    weights = read_foreign(path)
    frozen = frozen_encoder(EvaluationConfig(str(path)), torch.device("cpu"))
    assert frozen.size == 32
    assert frozen.said == weights.said
    pixels = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    shown = normalise(pixels, weights.mean, weights.std)
    for module in whole.encoder.modules():
        if layout == "ViTMAE" and isinstance(module, torch.nn.LayerNorm):
            module.eps = 1e-12  # the library's
    with torch.no_grad():
        expected = whole.encoder.eval().forward_features(shown)
        patches = frozen.tokens(pixels)[1]  # type: ignore[misc]
    assert (patches - expected[:, 1:]).abs().max() <= 1e-5


def test_folders_state_what_files_do_not(tmp_path: Path) -> None:
    """Heads, normalisation; ViTs of other kinds: registers, no class token, an average."""
    args = ARGS | {"num_heads": 2, "reg_tokens": 3, "class_token": False, "global_pool": "avg",
                   "init_values": 0.1}  # fmt: skip
    vit = student(**args).encoder
    state = {k: v.contiguous() for k, v in vit.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    cut = {k: v for k, v in state.items() if k != "fc_norm.bias"}
    save_file(cut, tmp_path / "cut.safetensors")
    with pytest.raises(ConfigError, match=r"in timm's layout, is no whole ViT: fc_norm.bias is"):
        read_foreign(tmp_path / "cut.safetensors")
    config = {"architecture": VIT, "model_args": args | {"img_size": 32},
              "pretrained_cfg": {"mean": [0.1] * 3, "std": [0.2] * 3}}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = read_foreign(tmp_path)
    assert (found.size, found.heads, tuple(found.mean)) == (32, 2, (0.1, 0.1, 0.1))
    assert found.args["reg_tokens"] == 3
    (tmp_path / "config.json").unlink()
    alone = read_foreign(tmp_path)
    assert alone.args["init_values"] == 1e-5
    assert {"reg_tokens": 3, "class_token": False}.items() <= alone.args.items()
    assert "heads are not in it: 1 assumed" in alone.said


def test_the_image_tower_of_a_clip(teacher_files: dict[str, str], tmp_path: Path) -> None:
    """A folder of open_clip gives the tokens of the teacher that it is; a detector stands on it."""
    weights = tmp_path / "open_clip_model.safetensors"
    shutil.copy(teacher_files["pretrained"], weights)
    shutil.copy(teacher_files["teacher"], tmp_path / "open_clip_config.json")
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')  # transformers', beside it
    found = read_foreign(tmp_path)
    assert ("in open_clip's layout" in found.said, "left out: " in found.said) == (True, True)
    assert "activation quick_gelu;" in found.said
    spec = TeacherSpec(teacher_files["teacher"], str(weights), precision="fp32")
    teacher = load_teacher(spec, device="cpu")
    vit = create_vit(found.model, img_size=found.size, args=found.args).eval()
    load_weights(vit, found, name="", leave=())
    images = torch.randn(2, 3, found.size, found.size)
    with torch.no_grad():
        expected = teacher.tower.tokens(images)
        tokens = vit.forward_features(images) @ teacher.visual.proj
    assert (tokens - expected).abs().max() <= 1e-5

    detecting = DetectorSpec(
        found.model, ("cell",), masks=False, size=64, model_args=found.args, window=0, width=8
    )
    under = detector_encoder(detecting)
    known = interpolated(found, under)
    load_weights(under, known, name="", leave=("head.", "norm."))
    with torch.no_grad():
        maps = Detector(under, detecting).backbone(torch.randn(1, 3, 64, 64))
    assert all(m.isfinite().all() for m in maps.values())

    assert read_foreign(weights).said == found.said
    (tmp_path / "open_clip_config.json").unlink()
    alone = read_foreign(weights)
    assert "CLIP's assumed; activation gelu assumed" in alone.said
    openai = {"context_length": torch.tensor(77)}  # as its files have, which run QuickGELU
    save_file(load_file(weights) | openai, weights)
    assert read_foreign(weights).args["act_layer"] == "quick_gelu"
    config = json.loads(Path(teacher_files["teacher"]).read_text())
    config["vision_cfg"]["pool_type"] = "avg"
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="is a CLIP with pool_type avg"):
        read_foreign(tmp_path)


class Hostile:
    """Calls a function when unpickled."""

    def __init__(self, function: Any, argument: str) -> None:
        self.call = (function, (argument,))

    def __reduce__(self) -> tuple:
        return self.call


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    """One line that says what it is; and no code in it runs."""
    state, mark, path = published(student()), tmp_path / "ran", tmp_path / "x.pth"

    def refused(found: str) -> None:
        with pytest.raises(ConfigError, match=found) as error:
            read_foreign(path)
        assert "\n" not in str(error.value)
        assert str(path) in str(error.value)
        assert not mark.exists()

    torch.save(state, path)
    whole = path.read_bytes()
    for data, found in (
        (b"", "it is empty"), (b"just text", "it is no checkpoint of torch"),
        (whole[: len(whole) // 2], "it ends too early, or is damaged"),
        (b"\n<!DOCTYPE html><title>Google Drive</title>", "is a web page"),
        (LFS_POINTER + b"v1\noid sha256:4d7a\n", "is a Git LFS pointer"),
    ):  # fmt: skip
        path.write_bytes(data)
        refused(found)
    shared = {"rel_pos_bias.relative_position_bias_table": torch.zeros(9, 2)}
    half = {k: v for k, v in state.items() if "blocks.1.attn" not in k}
    for content, found in (
        ({"model": state, "hook": Hostile(os.system, f"touch {mark}")}, r"is code.*posix.system"),
        ({"encoder": torch.zeros(2), "conv1.weight": torch.zeros(2)}, "in no known layout"),
        ({"student": state, "teacher": state}, "holds no state dict: it has student, teacher"),
        (without_key_bias(state) | shared, r"has relative positions \(rel_pos_bias"),
        (half, "blocks.1.attn.proj.bias, blocks.1.attn.proj.weight, blocks.1.attn.qkv.bias"),
        (state | {"blocks.1.extra": torch.ones(2)}, "blocks.1.extra is in it, and not"),
        (state | {"tower.bias": torch.ones(2)}, "has tower.bias, which MILAN's layout does not"),
        (state | {"patch_embed.proj.weight": torch.ones(64, 1, 8, 8)}, "patches of 1 x 8 x 8"),
        (state | {"pos_embed": torch.zeros(1, 12, 64)}, "has 12 positions"),
    ):  # fmt: skip
        torch.save(content, path)
        refused(found)
    # A call that the reader does not know is named, not made; the weights are there.
    code = Hostile(builtins.eval, f"open({str(mark)!r}, 'w')")
    torch.save({"model": state, "hook": code}, path)
    assert "hook (builtins.eval)" in read_foreign(path).said
    assert not mark.exists()
    torch.load(path, weights_only=False)
    assert mark.exists(), "the file does hold code: the care was needed"
    torch.save(student(), path)
    mark.unlink()
    refused(r"whole network \(milan.models.student.Student\), whose code is not run")
