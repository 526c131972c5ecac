"""The Python interface: the lines of docs/python.md, the loader, the encoder as timm loads it."""

from __future__ import annotations

import importlib.util
import pickle
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import fields
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import timm
import torch
from helpers import ROOT, STUDENT, Notes
from safetensors import safe_open
from torch.utils.data import DataLoader

import milan
import pipeline.extract
from milan.core import beside
from milan.errors import ConfigError
from milan.images.decode import decode
from milan.images.views import View, render
from milan.models.encoder import encode
from milan.store.cache import TargetCache
from pipeline.config import ExtractConfig

BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "docs/python.md").read_text(), re.DOTALL)
"""From images to an encoder; the encoder without milan; a loop of one's own."""
SMALL: dict[str, Any] = {**STUDENT, "batch_size": 8, "num_workers": 0}


@pytest.fixture(scope="module")
def run(finished_run: Callable[..., Path]) -> Path:
    """A run of two epochs from the shared store; not to be changed."""
    return finished_run(epochs=2)


def test_the_lines_of_the_docs(
    photos: Path,
    teacher_files: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Run as they stand there; only the sizes of things are small ones here."""
    blocks = BLOCKS[:2]
    small = partial(milan.extract_targets, executor="local", shard_size=8, **teacher_files)
    monkeypatch.setattr(milan, "extract_targets", small)
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
        exec(compile(block, "docs/python.md", "exec"), names)
        encoders.append(names["encoder"])
    assert len(names["views"]) == 48
    ours, theirs = (encoder.eval() for encoder in encoders)
    images = torch.randn(2, 3, 32, 32)
    assert (ours(images) - theirs(images)).abs().max() <= 1e-6


def test_the_loop_of_the_docs(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it stands there, and it learns: the loss is that of one pass over 48 views."""
    (block,) = BLOCKS[2:]
    assert len([line for line in block.splitlines() if "import" not in line and line]) <= 10
    (tmp_path / "targets.zarr").symlink_to(store)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(block, "docs/python.md", "exec"), names)
    assert 0 < names["loss"].item() < 2
    assert names["batch"]["image"].dtype == torch.float32
    assert any(p.grad.abs().sum() > 0 for p in names["student"].parameters())


def test_every_public_name_is_there() -> None:
    """Names load on first use: a misspelt home would show only then. dir() lists them."""
    for name in milan.__all__:
        assert getattr(milan, name) is not None
    assert dir(milan) == sorted(milan.__all__)
    assert set(milan._HOME) == set(milan.__all__) - {"__version__"}
    page = (ROOT / "docs/python.md").read_text()
    assert [name for name in milan.__all__ if f"`{name}`" not in page] == [
        "NoProgress",
        "__version__",
    ]
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        milan.nonsense  # noqa: B018


def test_several_machines_are_not_quietly_one(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From Python too, `num_nodes` means ranks on a cluster."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ConfigError, match="num_nodes 2 without a cluster"):
        milan.pretrain(str(store), out=str(tmp_path / "run"), num_nodes=2, **SMALL)
    assert not (tmp_path / "run").exists()


# --- progress -------------------------------------------------------------------------------------


def test_progress_shows_unless_told_otherwise(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The commands' lines by default; nothing for NoProgress; what another Progress was given."""
    assert milan.verify(store).code == 0
    shown = capsys.readouterr().out
    milan.verify(store, progress=milan.NoProgress())
    assert capsys.readouterr().out == ""
    heard = Notes()
    milan.pretrain(str(store), out=str(tmp_path / "a"), progress=heard, stop_after=1, **SMALL)
    assert capsys.readouterr().out == ""
    milan.pretrain(str(store), out=str(tmp_path / "b"), stop_after=1, **SMALL)
    shown += capsys.readouterr().out
    assert "train: 1 steps in" in shown
    assert all(line in shown for line in heard.lines)
    wrapped = milan.pretrain.__wrapped__  # type: ignore[attr-defined]
    assert milan.pretrain.__doc__ == wrapped.__doc__


@pytest.mark.parametrize("widgets", [False, True])
def test_a_notebook(widgets: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ipykernel asks for colours by FORCE_COLOR; without ipywidgets that must not mean a bar."""
    monkeypatch.setitem(sys.modules, "ipykernel", ModuleType("ipykernel"))
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.syspath_prepend(str(tmp_path))
    if widgets:
        (tmp_path / "ipywidgets.py").touch()
    importlib.invalidate_caches()
    spec = importlib.util.spec_from_file_location("notebook", ROOT / "stages/console.py")
    assert spec
    assert spec.loader
    console = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(console)
    assert console.out.is_terminal == widgets
    assert console._PLAIN_EVERY <= 10


# --- packages of the user's own -------------------------------------------------------------------


@pytest.fixture(params=["packages", "folders"])
def own_packages(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    """A program with packages called as ours are, or folders; ours are not imported yet."""
    for name in ("pipeline", "stages"):
        (tmp_path / name).mkdir()
        if request.param == "packages":
            (tmp_path / name / "__init__.py").touch()
        (tmp_path / name / "config.py").write_text("raise AssertionError('of the program')\n")
        (tmp_path / name / "own.py").write_text(f"NAME = 'my own {name}'\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(beside, "_set_aside", {"pipeline": {}, "stages": {}})
    before = {name: beside._take(name) for name in ("pipeline", "stages")}
    public = {name: vars(milan).pop(name) for name in milan._HOME if name in vars(milan)}
    yield tmp_path
    for name, modules in before.items():
        beside._take(name)
        sys.modules.update(modules)
    vars(milan).update(public)


def own_names() -> list[str]:
    return [importlib.import_module(f"{name}.own").NAME for name in ("pipeline", "stages")]


@pytest.mark.parametrize("order", ["theirs first", "ours first"])
def test_packages_called_as_ours_are(
    order: str, own_packages: Path, photos: Path, store: Path, teacher_files: dict[str, str],
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Both work in one process, in any order: functions, settings, progress, and the command."""
    theirs = ["my own pipeline", "my own stages"]
    if order == "theirs first":
        assert own_names() == theirs
    config = milan.ExtractConfig(str(photos), "t.zarr", executor="local", limit=2, **teacher_files)
    assert milan.extract_targets(config)["images"] == 2
    assert "extract: 2 images" in capsys.readouterr().out
    assert own_names() == theirs
    assert milan.verify("t.zarr").code == 0
    with pytest.raises(milan.MilanError, match="no data found"):
        milan.extract_targets("nowhere")
    monkeypatch.setattr(sys, "argv", ["milan", "inspect", "t.zarr"])
    monkeypatch.setattr("milan.__main__._LEAVE", 0.05)
    with pytest.raises(SystemExit, match="0"):
        importlib.import_module("milan.__main__").main()
    time.sleep(0.2)  # a process that goes on is not ended
    assert "teacher0/int8" in capsys.readouterr().out
    assert own_names() == theirs


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
        pixels = render(decode((views.roots[0][1] / key).read_bytes()), crop, size=32)
        np.testing.assert_array_equal(item["image"].permute(1, 2, 0), pixels)


def test_what_a_sample_is_called_and_becomes(store: Path, photos: Path) -> None:
    """`classes` names the labels; `transform` gets the pixels and changes nothing else."""
    plain = milan.open_cache(store)
    changed = milan.open_cache(store, transform=half)
    for index in (0, 17):
        item, other = plain[index], changed[index]
        assert plain.classes
        key = plain.cache.manifest.key(item["row"])
        assert plain.classes[item["label"]] == key.split("/")[0]
        assert torch.equal(other.pop("image"), item.pop("image") / 510)
        assert str(item) == str(other)
    sent = pickle.loads(pickle.dumps(changed))  # as to a loader worker
    assert torch.equal(sent[17]["image"], changed[17]["image"])


def half(image: torch.Tensor) -> torch.Tensor:
    assert image.dtype == torch.uint8
    return image / 510


def test_indices_from_the_end_and_beyond(store: Path) -> None:
    """A Dataset ends: iterating over it must stop."""
    views = milan.open_cache(str(store))
    assert views[-1]["row"] == 23
    with pytest.raises(IndexError, match="48 views"):
        views[48]
    assert sum(1 for _ in views) == 48


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.soak)])
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
