"""The Python interface: the README's own lines, the loader, the encoder as timm loads it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from helpers import ROOT, STUDENT
from safetensors import safe_open
from torch.utils.data import DataLoader

import milan
import pipeline.extract
from milan.errors import ConfigError
from milan.images.decode import decode
from milan.images.views import View, render
from milan.models.encoder import encode
from milan.store.cache import TargetCache
from pipeline.config import ExtractConfig

SMALL: dict[str, Any] = {**STUDENT, "batch_size": 8, "num_workers": 0}


@pytest.fixture(scope="module")
def run(finished_run: Callable[..., Path]) -> Path:
    """A run of two epochs from the shared store; not to be changed."""
    return finished_run(epochs=2)


def test_the_lines_of_the_readme(
    photos: Path,
    teacher_files: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Run as they stand there; only the sizes of things are small ones here."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 2
    blocks.sort(key=lambda block: "milan.pretrain(" not in block)
    small = partial(
        pipeline.extract.extract_targets, executor="local", shard_size=8, **teacher_files
    )
    monkeypatch.setattr(pipeline.extract, "extract_targets", small)
    shortened = milan.pretrain

    def short(*arguments: Any, **settings: Any) -> dict[str, Any]:
        return shortened(*arguments, **{**settings, **SMALL, "epochs": 1})

    monkeypatch.setattr(milan, "pretrain", short)
    create = partial(timm.create_model, img_size=32, **STUDENT["model_args"])
    monkeypatch.setattr(timm, "create_model", create)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").symlink_to(photos)
    names: dict[str, Any] = {"__name__": "__main__"}
    encoders = []
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
        encoders.append(names["encoder"])
    assert len(names["views"]) == 48
    ours, theirs = (encoder.eval() for encoder in encoders)
    images = torch.randn(2, 3, 32, 32)
    assert (ours(images) - theirs(images)).abs().max() <= 1e-6


def test_every_public_name_is_there() -> None:
    """Names load on first use: a misspelt home would show only then."""
    for name in milan.__all__:
        assert getattr(milan, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        milan.nonsense  # noqa: B018


def test_functions_take_the_commands_arguments(store: Path, tmp_path: Path) -> None:
    """Each field of a command's settings is a keyword; another word is refused."""
    names = {f.name for f in fields(milan.PretrainConfig)}
    assert {"cache", "out", "model", "model_args", "objective", "epochs", "num_workers"} <= names
    assert {"data", "out", "views", "teacher", "max_bad"} <= {f.name for f in fields(ExtractConfig)}
    with pytest.raises(ConfigError, match="unknown argument 'epoch'"):
        milan.pretrain(str(store), out=str(tmp_path / "run"), epoch=3)
    with pytest.raises(ConfigError, match="unknown argument 'view'"):
        pipeline.extract.extract_targets("photos", view=3)
    with pytest.raises(ConfigError, match="unknown argument 'check'"):
        milan.linear_probe("random", check=3)
    config = milan.PretrainConfig(str(store), out=str(tmp_path / "run"))
    with pytest.raises(ConfigError, match="epochs, lr beside a PretrainConfig") as error:
        milan.pretrain(config, epochs=3, lr=1e-3)
    assert error.value.fix == "dataclasses.replace(config, epochs=...)"
    assert not list(tmp_path.iterdir())


# --- the cache as a torch Dataset -----------------------------------------------------------------


def test_an_item_is_what_the_teacher_saw_and_said(store: Path, cache: TargetCache) -> None:
    """Item i is view i mod K of image i div K: pixels, targets and label of one and the same."""
    views = milan.open_cache(store)
    assert len(views) == 24 * 2
    for index in (0, 13, 47):
        item = views[index]
        row, view = divmod(index, 2)
        assert (item["row"], item["view"]) == (row, view)
        key = cache.manifest.key(row)
        assert item["label"] == int(key.split("/")[0].removeprefix("class "))
        assert (item["image"].dtype, tuple(item["image"].shape)) == (torch.uint8, (3, 32, 32))
        assert (item["features"].dtype, tuple(item["features"].shape)) == (torch.float32, (17, 24))
        assert tuple(item["attention"].shape) == (16,)
        targets = cache.read(np.array([row]), np.array([view]))
        decoded = targets.codes.astype(np.float32) * targets.scale[..., None]
        decoded *= cache.codec.tables["channel"]
        np.testing.assert_array_equal(item["features"], decoded[0])
        np.testing.assert_array_equal(item["attention"], targets.attention[0])
        crop = View.of(cache.crops(np.array([row]), np.array([view]))[0])
        pixels = render(decode((views.root / key).read_bytes()), crop, size=32)
        np.testing.assert_array_equal(item["image"].permute(1, 2, 0), pixels)


def test_indices_from_the_end_and_beyond(store: Path) -> None:
    """A Dataset ends: iterating over it must stop."""
    views = milan.open_cache(str(store))
    assert views[-1]["row"] == 23
    with pytest.raises(IndexError, match="48 views"):
        views[48]
    assert sum(1 for _ in views) == 48


@pytest.mark.parametrize("workers", [0, 1])
def test_in_a_loader_of_ones_own(workers: int, store: Path) -> None:
    """Shuffled by torch's DataLoader, with loader workers as the docstring says."""
    options = {"multiprocessing_context": "forkserver"} if workers else {}
    loader = DataLoader(
        milan.open_cache(store), batch_size=16, shuffle=True, num_workers=workers, **options
    )
    seen = []
    for batch in loader:
        assert batch["image"].shape == (16, 3, 32, 32)
        assert batch["features"].shape == (16, 17, 24)
        seen += list(zip(batch["row"].tolist(), batch["view"].tolist(), strict=True))
    assert sorted(seen) == [(row, view) for row in range(24) for view in range(2)]


# --- the encoder ----------------------------------------------------------------------------------


@pytest.fixture
def images() -> torch.Tensor:
    """Two normalised images."""
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))


def test_timm_loads_the_encoder(run: Path, images: torch.Tensor) -> None:
    """Strictly, by its timm name, and it computes what load_encoder's does."""
    theirs = timm.create_model(
        "vit_base_patch16_224", checkpoint_path=str(run / "encoder.safetensors"), num_classes=0,
        img_size=32, **STUDENT["model_args"],
    ).eval()  # fmt: skip
    ours = milan.load_encoder(run)
    assert not ours.training
    assert (ours(images) - theirs(images)).abs().max() <= 1e-6
    assert set(ours.state_dict()) == set(theirs.state_dict())


def test_the_encoder_is_the_one_that_was_trained(run: Path, images: torch.Tensor) -> None:
    """Not the initial weights, and no weight of the decoder."""
    from safetensors.torch import load_file

    newest = max((run / "checkpoints").iterdir()) / "model.safetensors"
    trained = {
        key.removeprefix("encoder."): value
        for key, value in load_file(newest).items()
        if key.startswith("encoder.")
    }
    ours = milan.load_encoder(str(run / "encoder.safetensors"))
    assert set(trained) == set(ours.state_dict())
    assert all(torch.equal(value, trained[key]) for key, value in ours.state_dict().items())
    # timm's own forward (class token after the norm) is the one that training used.
    assert (ours(images) - encode(ours, images)[:, 0]).abs().max() <= 1e-6


def test_the_encoder_file_says_what_it_is(run: Path, cache: TargetCache) -> None:
    """Its timm name, arguments, mean, std, input size and origin stand in the header."""
    with safe_open(run / "encoder.safetensors", framework="pt") as file:
        told = file.metadata()
    assert told["model"] == '"vit_base_patch16_224"'
    assert told["input_size"] == "32"
    assert told["mean"] == "[0.485, 0.456, 0.406]"
    assert told["std"] == "[0.229, 0.224, 0.225]"
    assert told["cache"] == f'"{cache.digest}"'
    assert '"embed_dim": 32' in told["model_args"]
    config = timm.data.resolve_model_data_config(milan.load_encoder(run))
    assert config["input_size"] == (3, 32, 32)
    assert config["mean"] == (0.485, 0.456, 0.406)


def test_a_file_of_someone_else_is_refused(tmp_path: Path) -> None:
    """No header of ours, or no file: an error that says so."""
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "encoder.safetensors")
    with pytest.raises(milan.MilanError, match="not written by milan"):
        milan.load_encoder(tmp_path)
    (tmp_path / "encoder.safetensors").write_bytes(b"torn")
    with pytest.raises(milan.MilanError, match="is damaged"):
        milan.load_encoder(tmp_path)
    with pytest.raises(milan.MilanError, match=r"no encoder\.safetensors"):
        milan.load_encoder(tmp_path / "none")
