"""Weights whose names are those of a wrapped model, in every place where weights are loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from milan.core.paths import LFS_POINTER
from milan.errors import CacheError, ConfigError, TeacherError
from milan.models.classifier import create_classifier
from milan.models.encoder import build_encoder
from milan.models.export import load_encoder, load_whole, save_encoder
from milan.models.published import load_published
from milan.models.state_dict import inner_state, unwrapped
from pipeline.teachers.weights import read_weights

SMALL = {"patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}
WRAPPED = {
    "DDP": "module.{}",
    "compiled": "_orig_mod.{}",
    "compiled DDP": "module._orig_mod.{}",
    "DDP of a compiled model": "_orig_mod.module.{}",
    "FSDP": "_fsdp_wrapped_module.{}",
}


def test_names_of_wrapped_models() -> None:
    """Wherever the wrapper is; what only looks like one stays."""
    for wrapped in WRAPPED.values():
        assert unwrapped({wrapped.format("blocks.0.weight"): 1}) == {"blocks.0.weight": 1}
    inside = {"blocks.0._orig_mod.attn._checkpoint_wrapped_module.qkv.weight": 1, "module": 2}
    assert unwrapped(inside) == {"blocks.0.attn.qkv.weight": 1, "module": 2}
    assert unwrapped({"my_module.weight": 1, "a.module.b": 2}) == {
        "my_module.weight": 1,
        "a.module.b": 2,
    }
    with pytest.raises(ValueError, match="a is there twice"):
        unwrapped({"a": 1, "module.a": 2})
    for container in ("state_dict", "model", "module"):
        assert inner_state({"epoch": 3, container: {"a": 1}}) == {"a": 1}
    assert inner_state({"module": 2}) == {"module": 2}


@pytest.mark.parametrize("wrapper", WRAPPED)
def test_teachers_and_encoders(wrapper: str, tmp_path: Path) -> None:
    """A teacher's file, pickled and safe; the encoder of a run that was saved again."""
    vit = build_encoder("vit_base_patch16_224", img_size=32, args=SMALL)
    state = {k: v.contiguous() for k, v in vit.state_dict().items()}
    wrapped = {WRAPPED[wrapper].format(k): v for k, v in state.items()}
    torch.save({"model": wrapped}, tmp_path / "run.pt")
    save_file(wrapped, tmp_path / "run.safetensors")
    for name in ("run.pt", "run.safetensors"):
        assert read_weights(tmp_path / name).keys() == state.keys()
    about = {
        "model": "vit_base_patch16_224", "model_args": SMALL, "mean": [0.5] * 3, "std": [0.5] * 3,
        "input_size": 32,
    }  # fmt: skip
    path = tmp_path / "encoder.safetensors"
    save_encoder(path, state, about)
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    save_file(wrapped, path, metadata=header)
    loaded = load_encoder(path)
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, state[name])
    save_file({"other": torch.zeros(1)}, path, metadata=header)
    with pytest.raises(CacheError, match="does not fit vit_base_patch16_224"):
        load_encoder(path)


def test_a_whole_network(tmp_path: Path) -> None:
    """A classifier that was saved again by another tool; so segmenters and detectors are loaded."""
    vit = create_classifier("vit_base_patch16_224", SMALL, size=32, classes=3, pooling="mean")
    for wrapper in WRAPPED.values():
        save_file({wrapper.format(k): v for k, v in vit.state_dict().items()}, tmp_path / "a")
        other = create_classifier("vit_base_patch16_224", SMALL, size=32, classes=3, pooling="mean")
        load_whole(other, tmp_path / "a", "a ViT")
        assert torch.equal(other.head.weight, vit.head.weight)
    save_file({"head.weight": torch.zeros(1), "module.head.weight": torch.ones(1)}, tmp_path / "a")
    with pytest.raises(CacheError, match="is there twice"):
        load_whole(vit, tmp_path / "a", "a ViT")


def test_git_lfs_pointers_in_place_of_weights(tmp_path: Path) -> None:
    """A clone without `git lfs pull`."""
    for name in ("encoder.safetensors", "a.pt"):
        path = tmp_path / name
        path.write_bytes(LFS_POINTER + b"v1\noid sha256:4d7a\nsize 12345\n")
        with pytest.raises(TeacherError, match=r"is a Git LFS pointer.*git lfs pull"):
            read_weights(path)
        with pytest.raises(ConfigError, match="is a Git LFS pointer"):
            load_published(path)
    with pytest.raises(CacheError, match="is a Git LFS pointer"):
        load_encoder(tmp_path)
