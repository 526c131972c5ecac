"""`--init` and `--text-tower` of a RILS student: what is taken, and towers that do not fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pyarrow.parquet as pq
import pytest
import torch
from helpers import ROOT, Notes
from safetensors.torch import load_file, save_file

from milan.config import PretrainConfig
from milan.errors import MilanError
from milan.models.rils import (
    RilsStudent,
    load_text_tower,
    published_shape,
    published_state,
    rils_decoder,
)
from milan.models.student import build_student
from milan.models.text_encoder import TextEncoder, TextShape
from milan.store.cache import TargetCache
from milan.training.build import resolve_defaults, student_of
from milan.training.initial import initialise_from
from pipeline.extract import extract_targets

DEMO = ROOT / "demo" / "teacher"
VIT = "vit_base_patch16_224"
ENCODER = {"patch_size": 7, "embed_dim": 32, "depth": 1, "num_heads": 4}
TEXT = TextShape(49_408, 24, width=40, heads=4, layers=1, joint=16, quick_gelu=False)


def student(seed: int, text: TextShape = TEXT, **changes: Any) -> RilsStudent:
    given = ENCODER | changes
    plain = build_student(
        VIT, img_size=28, target_width=given["embed_dim"], decoder_kind="mae", model_args=given,
        decoder=rils_decoder(given["embed_dim"], 4), seed=seed,
    )  # fmt: skip
    torch.manual_seed(seed)
    return RilsStudent(plain.encoder, plain.decoder, TextEncoder(text))


def saved(path: Path, of: RilsStudent, **header: Any) -> Path:
    about = published_shape(of) | {name: json.dumps(value) for name, value in header.items()}
    save_file(published_state(of.state_dict()), path, metadata=about)
    return path


def same(one: Any, other: Any, part: str = "") -> set[bool]:
    pairs = other.state_dict()
    return {
        torch.equal(w, pairs[n]) for n, w in one.state_dict().items()
        if n.startswith(part) and not n.endswith("qkv.bias") and "pos_embed" not in n
    }  # fmt: skip


def test_all_parts_that_fit_are_taken(tmp_path: Path) -> None:
    """Of a file, and of a run's folder; another text tower stays as it was drawn."""
    there = student(0)
    file = saved(tmp_path / "rils.safetensors", there)
    for init in (str(file), str(tmp_path)):
        ours, notes = student(1), Notes()
        kept = initialise_from(PretrainConfig(model=VIT, init=init), ours, notes)
        assert same(there, ours) == {True}
        assert "text tower and projections taken" in notes.line("initial weights")
        assert kept["initial"]["text tower"] == "and projections taken too"
    narrow = student(1, TextShape(49_408, 24, width=24, heads=4, layers=1, joint=16))
    drawn = {n: w.clone() for n, w in narrow.state_dict().items()}
    notes = Notes()
    initialise_from(PretrainConfig(model=VIT, init=str(file)), narrow, notes)
    assert same(there, narrow, "encoder.blocks") == same(there, narrow, "decoder.blocks") == {True}
    assert torch.equal(narrow.text.projection, drawn["text.projection"])
    assert "another shape" in notes.line("initial weights")


def test_a_text_tower_of_open_clip(tmp_path: Path) -> None:
    """Its texts are those of open_clip, from a file as it is saved; a run's file gives the same."""
    config = json.loads((DEMO / "config.json").read_text())["model_cfg"]
    clip = open_clip.CLIP(**config).eval()
    clip.load_state_dict(load_file(DEMO / "model.safetensors"))
    ids = open_clip.SimpleTokenizer(context_length=24)(["a dark bag.", "a photo of a coat."])
    tower = load_text_tower(DEMO / "model.safetensors", TEXT)
    with torch.inference_mode():
        torch.testing.assert_close(tower(ids), clip.encode_text(ids), atol=1e-5, rtol=1e-4)
    torch.save({"state_dict": clip.state_dict()}, tmp_path / "clip.pt")
    assert same(tower, load_text_tower(tmp_path / "clip.pt", TEXT)) == {True}
    there = student(3)
    again = load_text_tower(saved(tmp_path / "rils.safetensors", there), TextShape())
    assert same(there.text, again) == {True}
    assert again.shape == there.text.shape


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of the token ids of 16 images."""
    folder = tmp_path_factory.mktemp("tokens")
    pq.write_table(pq.read_table(ROOT / "demo/data/test.parquet")[:16], folder / "a.parquet")
    extract_targets(str(folder / "a.parquet"), out=str(folder / "t.zarr"), targets="none", views=1,
                    teacher=str(DEMO / "config.json"), executor="local")  # fmt: skip
    return folder / "t.zarr"


def test_a_run_begins_with_that_tower(tokens: Path) -> None:
    """--text-tower FILE: its weights and width, whatever the seed."""
    file = str(DEMO / "model.safetensors")
    config = PretrainConfig(objective="rils", model_args=ENCODER, batch_size=8, text_tower=file)
    made = student_of(resolve_defaults(config, torch.device("cpu")), TargetCache(tokens))
    assert isinstance(made, RilsStudent)
    expected = load_text_tower(DEMO / "model.safetensors", made.text.shape)
    assert same(expected, made.text) == {True}
    assert made.image_projection.shape == (32, 64)


def _without_text(folder: Path) -> dict[str, Any]:
    state = published_state(student(0).state_dict())
    save_file({n: w for n, w in state.items() if "token" not in n}, folder / "x.safetensors")
    return {"text_tower": str(folder / "x.safetensors")}


def _two_widths(folder: Path) -> dict[str, Any]:
    state = published_state(student(0).state_dict()) | {"text_projection": torch.zeros(48, 16)}
    save_file(state, folder / "x.safetensors")
    return {"text_tower": str(folder / "x.safetensors")}


def _tower(**changes: Any) -> Callable[[Path], dict[str, Any]]:
    shape = TextShape(**{**vars(TEXT), **changes})
    return lambda folder: {"text_tower": str(saved(folder / "x.safetensors", student(0, shape)))}


def _encoder(**changes: Any) -> Callable[[Path], dict[str, Any]]:
    return lambda folder: {
        "init": str(saved(folder / "x.safetensors", student(0, **changes)))
    }  # fmt: skip


BAD: dict[str, tuple[Callable[[Path], dict[str, Any]], str]] = {
    "no file": (lambda folder: {"text_tower": "gone.pt"}, "no checkpoint at gone.pt"),
    "an encoder alone": (_without_text, "no text tower of CLIP's shape in .*: it has no 'token_"),
    "two widths": (_two_widths, "no text tower of CLIP's shape.*text_projection|projection"),
    "heads that do not divide": (
        lambda folder: {"text_tower": str(saved(folder / "x.safetensors", student(0),
                                                text_heads=7))},
        "a text tower of width 40 with 7 heads",
    ),
    "few words": (_tower(vocabulary=99), "ids up to 49,407, and the text tower .* of up to 98"),
    "short texts": (_tower(context=9), "texts of 24 tokens .* reads 9 of"),
    "a wider encoder": (_encoder(embed_dim=64), "do not fit vit_base_patch16_224: "),
    "another CLIP": (lambda folder: {"init": str(DEMO / "model.safetensors")},
                     "blocks.0.attn.proj.bias is 128 in it, and 32 in the model"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_towers_that_do_not_fit(case: str, tokens: Path, tmp_path: Path) -> None:
    """One line, with what was found."""
    make, message = BAD[case]
    config = PretrainConfig(
        objective="rils", model_args=ENCODER, batch_size=8, model=VIT, **make(tmp_path)
    )
    settings = resolve_defaults(config, torch.device("cpu"))
    with pytest.raises(MilanError, match=message) as error:
        initialise_from(config, student_of(settings, TargetCache(tokens)), Notes())
    assert "\n" not in str(error.value)
