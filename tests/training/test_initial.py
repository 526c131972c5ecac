"""`--init`: the weights that a run starts from."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from helpers import SMALL, Notes, published
from safetensors.torch import load_file

import milan
from milan.config import PretrainConfig
from milan.core.device import MEAN, STD
from milan.errors import CacheError, ConfigError, TrainError
from milan.models.encoder import sincos_positions
from milan.models.export import save_encoder
from milan.models.student import Student, build_student
from milan.training.checkpoint import whole_weights
from milan.training.initial import check_absolute, initialise_from

VIT = "vit_tiny_patch16_224"
DECODER = {"embed_dim": 32, "depth": 1, "num_heads": 16}


def tiny(size: int = 64, seed: int = 0, **changes: Any) -> Student:
    """A ViT-tiny of one block."""
    settings: dict[str, Any] = {"model_args": {"depth": 1}, "decoder": DECODER} | changes
    return build_student(VIT, img_size=size, target_width=8, seed=seed, **settings)


def initialised(init: object, student: Student, **settings: Any) -> str:
    """Give a student the weights; what was said."""
    notes = Notes()
    config = PretrainConfig(model=VIT, init=str(init), **settings)
    initialise_from(config, student, notes)
    return notes.line("initial weights")


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Weights of timm's ViT-tiny, drawn here in place of those that a hub has."""
    create = timm.create_model

    def make(name: str, pretrained: bool = False, **args: Any) -> Any:
        model = create(name, **args | ({"depth": 1} if pretrained else {}))
        if pretrained:
            generator = torch.Generator().manual_seed(5)
            for parameter in model.parameters():
                torch.nn.init.normal_(parameter, std=0.2, generator=generator)
        return model

    monkeypatch.setattr(timm, "create_model", make)
    return make


def test_of_another_run(store: Path, finished_run: Callable[..., Path], tmp_path: Path) -> None:
    """The encoder is the other run's, the decoder the seed's; it is kept in run.json, and a run of
    other initial weights is another."""
    other, run = finished_run(), {**SMALL, "out": str(tmp_path), "epochs": 1, "lr": 1e-30}
    notes = Notes()
    milan.pretrain(str(store), init=str(other), progress=notes, stop_after=1, **run)
    assert notes.line("initial weights").endswith("decoder drawn by the seed")
    theirs = load_file(other / "encoder.safetensors")
    ours = load_file(tmp_path / "encoder.safetensors")
    assert all(torch.allclose(ours[name], tensor, atol=1e-6) for name, tensor in theirs.items())
    about = json.loads((tmp_path / "run.json").read_text())
    assert about["identity"]["init"] == about["initial"]["encoder"] == str(other)
    with pytest.raises(TrainError, match=r"init: .* != none"):
        milan.pretrain(str(store), **run)


def test_of_another_image_size(tmp_path: Path) -> None:
    """Sine-cosine positions are those of the new grid; learned ones are resampled."""
    other = tiny(64, seed=1).encoder
    about = {"model": VIT, "model_args": {"depth": 1}, "mean": MEAN, "std": STD, "input_size": 64}
    save_encoder(tmp_path / "encoder.safetensors", whole_weights(other), about)
    student = tiny(32)
    initialised(tmp_path, student)
    assert torch.equal(student.encoder.pos_embed[:, 1:], sincos_positions(192, 2)[:, 1:])
    assert torch.equal(student.encoder.blocks[0].attn.qkv.weight, other.blocks[0].attn.qkv.weight)
    ramp = torch.arange(4.0).repeat(4).view(1, 16, 1).expand(1, 16, 192)  # by column
    other.pos_embed.data[:, 1:] = ramp
    save_encoder(tmp_path / "encoder.safetensors", whole_weights(other), about)
    initialised(tmp_path, student)
    left, right = student.encoder.pos_embed[0, 1:, 0].view(2, 2).T
    assert (left < right).all()


def test_of_timm(fetched: Callable[..., Any]) -> None:
    """Its features, by its positions, though it was made for another normalisation."""
    student = tiny(64)
    assert "its normalisation folded in" in initialised(f"timm:{VIT}", student)
    model = fetched(VIT, pretrained=True, num_classes=0, img_size=64).eval()
    data = timm.data.resolve_model_data_config(model)
    assert data["mean"] != MEAN
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))

    def shown(mean: Any, std: Any) -> torch.Tensor:
        return (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)

    with torch.no_grad():
        ours = student.eval().encoder.forward_features(shown(MEAN, STD))
        theirs = model.forward_features(shown(data["mean"], data["std"]))
    assert torch.allclose(ours, theirs, atol=1e-4)
    assert torch.equal(student.encoder.pos_embed, model.pos_embed)
    assert not student.encoder.pos_embed.requires_grad


@pytest.mark.parametrize("fits", [True, False])
def test_published(fits: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole student where its decoder fits, else the encoder, and that is said."""
    whole = tiny(seed=1, model_args={"depth": 1, "num_heads": 3, "embed_dim": 192})
    state = published(whole)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(ConfigError, match=f"checkpoints/milan-{VIT}.pth") as error:
        initialised("published", tiny())
    assert error.value.fix.startswith("--init published:FILE")
    path = tmp_path / f"checkpoints/milan-{VIT}.pth"
    path.parent.mkdir()
    torch.save({"model": state}, path)
    student = tiny() if fits else tiny(decoder=DECODER | {"embed_dim": 16})
    told = initialised("published" if fits else f"published:{path}", student)
    assert told.endswith("decoder the published one") == fits
    assert torch.equal(student.encoder.norm.weight, whole.encoder.norm.weight)
    qkv = whole.encoder.blocks[0].attn.qkv.weight
    assert torch.equal(student.encoder.blocks[0].attn.qkv.weight, qkv)
    same = student.decoder.embed.weight.shape == whole.decoder.embed.weight.shape
    assert same == fits
    if fits:
        assert torch.equal(student.decoder.embed.weight, whole.decoder.embed.weight)


def test_what_does_not_fit(
    fetched: Callable[..., Any], finished_run: Callable[..., Path], tmp_path: Path
) -> None:
    """The first part that differs, in both shapes, and the model that has such weights."""
    run = finished_run()
    cases: list[tuple[str, Student, type[Exception], str, str]] = [
        (str(run), tiny(), ConfigError, "blocks.0.attn.proj.bias is 32 in it, and 192", "--model"),
        (f"timm:{VIT}", tiny(model_args={"depth": 2}), ConfigError, "7 more are not in it", VIT),
        (f"timm:{VIT}", tiny(model_args={"depth": 1, "init_values": 0.1}), ConfigError,
         r"blocks.0.ls1.gamma, blocks.0.ls2.gamma are not in it", VIT),
        (f"timm:{VIT}", tiny(model_args={"depth": 1, "num_heads": 6}), ConfigError,
         "are of 3 heads, vit_tiny_patch16_224 has 6", "--set model.num_heads=3"),
        ("timm:vit_tini", tiny(), ConfigError, "unknown", "tiny"),
        ("timm:resnet50", tiny(), ConfigError, "resnet50", ""),
        (str(tmp_path), tiny(), CacheError, "no encoder.safetensors", ""),
        ("publisched", tiny(), ConfigError, "no run at publisched", "published"),
    ]  # fmt: skip
    for init, student, kind, found, fix in cases:
        with pytest.raises(kind, match=found) as error:
            initialised(init, student)
        assert fix in getattr(error.value, "fix", "")


def test_on_several_machines_paths_are_absolute() -> None:
    """Their working folders are others."""
    for init in (None, "timm:vit_tiny_patch16_224", "published", "published:/a/b.pth", "/runs/a"):
        check_absolute(init)
    for init in ("runs/a", "published:b.pth"):
        with pytest.raises(ConfigError, match="an absolute path") as error:
            check_absolute(init)
        assert f"{Path.cwd()}/" in error.value.fix
