"""Checkpoints: bit for bit, whole or not at all, and nothing in them can run code."""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import published
from safetensors.torch import load_file, save_file
from timm.optim import param_groups_weight_decay

from milan.core.atomic import write_json
from milan.core.device import MEAN, STD
from milan.errors import CacheError, ConfigError, TrainError
from milan.models.export import load_encoder, read_about, save_encoder
from milan.models.masking import random_mask
from milan.models.published import load_published
from milan.models.student import Student, build_student
from milan.training import checkpoint
from milan.training.checkpoint import whole_weights

VIT = "vit_base_patch16_224"
SMALL = {"patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}
DECODER = {"embed_dim": 16, "depth": 1, "num_heads": 2}
FILES = ("model.safetensors", "optimiser.safetensors", "state.json")


def student(seed: int = 0, **changes: Any) -> Student:
    return build_student(
        VIT, img_size=32, target_width=8, model_args=SMALL | changes, decoder=DECODER, seed=seed
    )


def adamw(model: Student) -> torch.optim.AdamW:
    return torch.optim.AdamW(param_groups_weight_decay(model, 0.05), lr=1e-2, betas=(0.9, 0.95))


def train(model: Student, optimiser: torch.optim.Optimizer, steps: range) -> None:
    """Steps with batches drawn at their number."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        images = torch.randn(2, 3, 32, 32, generator=generator)
        noise = torch.rand(2, 16, generator=generator).clamp(1e-6, 1 - 1e-6)
        optimiser.zero_grad()
        model(images, random_mask(noise, visible=4)).square().mean().backward()
        optimiser.step()


def bits(model: Student, optimiser: torch.optim.Optimizer) -> dict[str, bytes]:
    """Everything that training goes on from, as bytes."""
    found = {name: t.numpy().tobytes() for name, t in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        for key, value in optimiser.state[parameter].items():
            found[f"{name}|{key}"] = torch.as_tensor(value).numpy().tobytes()
    return found


Trained = tuple[Student, torch.optim.AdamW]


@pytest.fixture
def trained() -> Trained:
    """A student of three steps."""
    model = student()
    optimiser = adamw(model)
    train(model, optimiser, range(3))
    return model, optimiser


def save(run: Path, step: int, trained: Trained, *, keep: int = 9) -> Path:
    run.mkdir(exist_ok=True)
    model, optimiser = trained
    writer = checkpoint.Writer(run, model, optimiser, keep=keep)
    writer.save(step, {"scaler": {"scale": 65536.0}, "losses": [1.5, 2]})
    writer.wait()
    return run / "checkpoints" / f"step-{step:08d}"


def load(run: Path) -> tuple[dict | None, Student, torch.optim.AdamW]:
    """What a new process finds: another seed's weights, to be overwritten."""
    model = student(seed=99)
    optimiser = adamw(model)
    step = checkpoint.newest(run, note=lambda _: None)
    if step is None:
        return None, model, optimiser
    return checkpoint.load(run, step, model=model, optimiser=optimiser), model, optimiser


# --- a run's checkpoints --------------------------------------------------------------------------


def test_round_trip_is_exact(tmp_path: Path, trained: Trained) -> None:
    """Weights, both moments and the step count of each parameter: the next steps are the same."""
    folder = save(tmp_path, 3, trained)
    assert folder == tmp_path / "checkpoints" / "step-00000003"
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    state, model, optimiser = load(tmp_path)
    assert state is not None
    assert (state["step"], state["scaler"]) == (3, {"scale": 65536.0})
    kept = bits(*trained)
    assert bits(model, optimiser) == kept
    assert sum(name.endswith(("|exp_avg", "|exp_avg_sq", "|step")) for name in kept) > 60
    train(*trained, range(3, 6))
    train(model, optimiser, range(3, 6))
    assert bits(model, optimiser) == bits(*trained)
    assert bits(model, optimiser) != kept


def test_moments_matter(tmp_path: Path, trained: Trained) -> None:
    """The test above can fail: weights alone would train differently."""
    save(tmp_path, 3, trained)
    _, model, _ = load(tmp_path)
    train(*trained, range(3, 5))
    fresh = adamw(model)
    train(model, fresh, range(3, 5))
    assert bits(model, fresh) != bits(*trained)


def test_nothing_to_load(tmp_path: Path) -> None:
    """A fresh run: nothing is touched."""
    expected = student(seed=99).state_dict()
    for run in (tmp_path, tmp_path / "none"):
        state, model, optimiser = load(run)
        assert state is None
        assert all(torch.equal(t, expected[name]) for name, t in model.state_dict().items())
        assert not optimiser.state
        assert checkpoint.steps(run) == []


def test_the_newest_is_loaded(tmp_path: Path, trained: Trained) -> None:
    """By number, not by name or time of writing."""
    for step in (9, 20, 100_000_000):
        save(tmp_path, step, trained)
        train(*trained, range(step, step + 1))
    assert checkpoint.steps(tmp_path) == [9, 20, 100_000_000]
    state, _, _ = load(tmp_path)
    assert state is not None
    assert state["step"] == 100_000_000


DAMAGE: dict[str, Callable[[Path], object]] = {
    "halved": lambda path: os.truncate(path, path.stat().st_size // 2),
    "one byte short": lambda path: os.truncate(path, path.stat().st_size - 3),
    "empty": lambda path: os.truncate(path, 0),
    "gone": lambda path: path.unlink(),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
}


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_torn_checkpoint_is_passed_over(
    tmp_path: Path, trained: Trained, file: str, damage: str
) -> None:
    """A machine that crashed while writing: the one before is whole, and is all of it loaded."""
    save(tmp_path, 3, trained)
    whole = bits(*trained)
    train(*trained, range(3, 5))
    newest = save(tmp_path, 5, trained)
    DAMAGE[damage](newest / file)
    state, model, optimiser = load(tmp_path)
    assert state is not None
    assert state["step"] == 3
    assert bits(model, optimiser) == whole


def test_going_on_after_a_torn_one(tmp_path: Path, trained: Trained) -> None:
    """The torn one is written anew when its step comes again."""
    save(tmp_path, 3, trained)
    newest = save(tmp_path, 5, trained)
    os.truncate(newest / "model.safetensors", 10)
    train(*trained, range(3, 5))
    save(tmp_path, 5, trained)
    state, model, optimiser = load(tmp_path)
    assert state is not None
    assert state["step"] == 5
    assert bits(model, optimiser) == bits(*trained)


def test_a_torn_one_is_none_of_those_kept(tmp_path: Path, trained: Trained) -> None:
    """A run that went on before it removes it, and keeps as many whole ones as it is told."""
    save(tmp_path, 10, trained)
    torn = save(tmp_path, 20, trained)
    os.truncate(torn / "model.safetensors", 10)
    save(tmp_path, 13, trained, keep=1)
    assert checkpoint.steps(tmp_path) == [13]
    save(tmp_path, 16, trained, keep=2)
    assert checkpoint.steps(tmp_path) == [13, 16]


def test_only_the_newest_are_kept(tmp_path: Path, trained: Trained) -> None:
    """The old are dropped after the new one is whole, never before."""
    for step in range(1, 6):
        save(tmp_path, step, trained, keep=2)
        assert checkpoint.steps(tmp_path) == [s for s in (step - 1, step) if s]
    save(tmp_path, 6, trained, keep=1)
    assert checkpoint.steps(tmp_path) == [6]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000006"]


def test_a_half_written_checkpoint_does_not_exist(tmp_path: Path, trained: Trained) -> None:
    """Killed while writing: what is left has another name, and the next save clears it."""
    whole = save(tmp_path, 3, trained)
    left = whole.with_name(".step-00000005.tmp")
    shutil.copytree(whole, left)
    (left / "state.json").unlink()
    (left / "junk").write_text("left over")
    assert checkpoint.steps(tmp_path) == [3]
    state, _, _ = load(tmp_path)
    assert state is not None
    assert state["step"] == 3
    folder = save(tmp_path, 5, trained)
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    assert not left.exists()


@pytest.mark.parametrize("at", range(8))
def test_killed_at_any_moment(
    tmp_path: Path, trained: Trained, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """Stopped before the n-th file operation of a save: the older one is loaded, whole."""
    save(tmp_path, 3, trained)
    before = bits(*trained)
    train(*trained, range(3, 5))
    after = bits(*trained)
    count = 0

    class Killed(BaseException):
        pass

    def counted(call: Callable) -> Callable:
        def run(*arguments: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            if count > at:
                raise Killed
            return call(*arguments, **options)

        return run

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", counted(checkpoint.save_file))
        patch.setattr(os, "fsync", counted(os.fsync))
        patch.setattr(os, "replace", counted(os.replace))
        with pytest.raises(Killed):
            save(tmp_path, 5, trained, keep=1)
    state, model, optimiser = load(tmp_path)
    assert state is not None
    assert state["step"] == 3
    assert bits(model, optimiser) == before
    save(tmp_path, 5, trained, keep=1)
    state, model, optimiser = load(tmp_path)
    assert bits(model, optimiser) == after


def test_another_models_checkpoint_is_refused(tmp_path: Path, trained: Trained) -> None:
    """Not passed over as torn: the settings have changed, and that is said."""
    save(tmp_path, 3, trained)
    model = student(embed_dim=64)
    with pytest.raises(TrainError, match="of another model") as error:
        checkpoint.load(tmp_path, 3, model=model, optimiser=adamw(model))
    assert "step-00000003" in str(error.value)
    assert "--resume never" in error.value.fix


def test_files_are_there_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A curve that DVC reads while it is rewritten."""
    path = tmp_path / "a.json"
    write_json(path, {"ü": [1, 2.5]})
    assert json.loads(path.read_text()) == {"ü": [1, 2.5]}

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_json(path, {"other": 1})
    assert json.loads(path.read_text()) == {"ü": [1, 2.5]}


# --- the encoder ----------------------------------------------------------------------------------

ABOUT = {
    "model": VIT, "model_args": SMALL, "mean": MEAN, "std": STD, "input_size": 32,
    "teacher": {"name": "ü", "notes": [1, None]},
}  # fmt: skip


def test_the_encoder_comes_back(tmp_path: Path) -> None:
    """From the run's folder or the file, in eval mode, with what is said of it."""
    path = tmp_path / "encoder.safetensors"
    encoder = student().encoder
    save_encoder(path, whole_weights(encoder), ABOUT)
    assert [p.name for p in tmp_path.iterdir()] == ["encoder.safetensors"]
    for place in (tmp_path, path, str(path)):
        loaded = load_encoder(place)
        assert not loaded.training
        expected = encoder.state_dict()
        assert loaded.state_dict().keys() == expected.keys()
        assert all(torch.equal(t, expected[name]) for name, t in loaded.state_dict().items())
        assert read_about(place) == json.loads(json.dumps(ABOUT))
    assert loaded.pretrained_cfg["input_size"] == (3, 32, 32)
    assert loaded.pretrained_cfg["mean"] == MEAN


def test_the_same_encoder_is_the_same_file(tmp_path: Path) -> None:
    """DVC would take another order of the header's keys for another encoder."""
    written = set()
    for i in range(5):
        save_encoder(tmp_path / f"{i}.safetensors", whole_weights(student().encoder), ABOUT)
        written.add((tmp_path / f"{i}.safetensors").read_bytes())
    assert len(written) == 1
    data = written.pop()
    assert int.from_bytes(data[:8], "little") % 8 == 0
    assert load_file(tmp_path / "0.safetensors").keys() == student().encoder.state_dict().keys()


def test_encoders_of_others_are_refused(tmp_path: Path) -> None:
    """Not there, cut short, or without milan's header."""
    with pytest.raises(CacheError, match=r"no encoder\.safetensors"):
        load_encoder(tmp_path)
    path = tmp_path / "encoder.safetensors"
    save_file({"a": torch.zeros(2)}, path)
    with pytest.raises(CacheError, match="was not written by milan"):
        load_encoder(tmp_path)
    save_encoder(path, whole_weights(student().encoder), ABOUT)
    os.truncate(path, path.stat().st_size - 10)
    with pytest.raises(CacheError, match="damaged"):
        load_encoder(tmp_path)


# --- published checkpoints ------------------------------------------------------------------------

HEADS = {"num_heads": 2, "decoder_num_heads": 2}


PUBLISHED = ["dict", "arrays", "pth", "bare pth", "safetensors"]


@pytest.mark.parametrize("kind", [*PUBLISHED, "compiled, in a training checkpoint"])
def test_published_layout(tmp_path: Path, kind: str) -> None:
    """As released: a .pth with `model` and the command line, an argparse.Namespace; and others."""
    model = student()
    state = published(model)
    assert {"cls_token", "mask_token", "decoder_blocks.0.attn.kv.weight"} <= state.keys()
    source: Any = state
    if kind == "arrays":
        source = {name: tensor.numpy() for name, tensor in state.items()}
    elif kind == "pth":
        source = tmp_path / "checkpoint-399.pth"
        arguments = argparse.Namespace(lr=2.4e-3, model="mae_vit_base_patch16", epochs=400)
        torch.save({"model": state, "args": arguments, "epoch": 399}, source)
    elif kind == "bare pth":
        source = str(tmp_path / "bare.pth")
        torch.save(state, source)
    elif kind == "compiled, in a training checkpoint":
        source = tmp_path / "run.pth"
        state = {f"module._orig_mod.{name}": tensor for name, tensor in state.items()}
        torch.save({"state_dict": state, "epoch": 399}, source)
    elif kind == "safetensors":
        source = tmp_path / "x.safetensors"
        save_file(state, source)
    loaded = load_published(source, config=HEADS)
    assert not loaded.training
    expected = model.state_dict()
    assert all(torch.equal(t, expected[name]) for name, t in loaded.state_dict().items())
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    mask = random_mask(torch.linspace(0.01, 0.99, 32).view(2, 16), visible=4)
    with torch.no_grad():
        assert torch.equal(loaded(images, mask), model.eval()(images, mask))


def test_heads_are_the_published_ones() -> None:
    """They are in no weight: by width for the encoder, 16 for the decoder."""
    state = published(
        build_student(
            VIT, img_size=32, target_width=8,
            model_args={"patch_size": 8, "embed_dim": 384, "depth": 1, "num_heads": 6},
            decoder={"embed_dim": 64, "depth": 1, "num_heads": 16},
        )
    )  # fmt: skip
    loaded = load_published(state)
    assert loaded.encoder.blocks[0].attn.num_heads == 6
    assert loaded.decoder.blocks[0].attn.heads == 16


class Hostile:
    """Runs a command when unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return (os.system, (f"touch {self.mark}",))


def test_pickles_with_code_are_refused(tmp_path: Path) -> None:
    """And the code is not run."""
    mark = tmp_path / "ran"
    path = tmp_path / "evil.pth"
    torch.save({"model": published(student()), "args": Hostile(mark)}, path)
    with pytest.raises(ConfigError, match="cannot be loaded safely"):
        load_published(path)
    assert not mark.exists()
    torch.load(path, weights_only=False)
    assert mark.exists(), "the file does hold code: the refusal was needed"


def test_other_layouts_are_refused() -> None:
    """What is missing is named: timm's encoder alone, MAE's decoder, one tensor too few or many."""
    state = published(student())
    encoder = student().encoder.state_dict()
    mae = {name.replace("attn.kv", "attn.qkv"): tensor for name, tensor in state.items()}
    without = {name: tensor for name, tensor in state.items() if name != "blocks.0.norm1.weight"}
    for wrong, message in (
        (encoder, "decoder_embed.weight"),
        (mae, "attn.qkv"),
        (without, r"blocks\.0\.norm1"),
        (state | {"prototypes": torch.zeros(2)}, "prototypes"),
        (state | {"pos_embed": torch.zeros(1, 17, 16)}, "pos_embed"),
        (state | {"patch_embed.proj.weight": torch.zeros(3)}, "published layout"),
        ({"state_dict": state, "epoch": 3}, "published layout"),
        ({}, "patch_embed"),
    ):
        with pytest.raises(ConfigError, match=message) as error:
            load_published(wrong, config=HEADS)
        assert "published layout" in str(error.value)
        assert "\n" not in str(error.value)


def test_files_that_are_no_checkpoint(tmp_path: Path) -> None:
    """Missing, empty, text, torn, or of something else than named tensors."""
    path = tmp_path / "x.pth"
    for place in (path, tmp_path):
        with pytest.raises(ConfigError, match="no checkpoint at"):
            load_published(place)
    torch.save(published(student()), path)
    whole = path.read_bytes()
    for data in (b"", b"text", whole[: len(whole) // 2]):
        path.write_bytes(data)
        with pytest.raises(ConfigError, match="cannot be loaded safely"):
            load_published(path)
    for held in (torch.zeros(3), [1, 2], {"model": 3}):
        torch.save(held, path)
        with pytest.raises(ConfigError, match="holds no state dict"):
            load_published(path)
    path = tmp_path / "x.safetensors"
    save_file(published(student()), path)
    os.truncate(path, 100)
    with pytest.raises(ConfigError, match="damaged"):
        load_published(path)
