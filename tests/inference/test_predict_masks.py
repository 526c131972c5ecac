"""Predictions of a segmenter for a folder: masks, and the table of what fills each image."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from helpers import SCENE_COLOURS, draw_masks
from PIL import Image

from milan.core.device import MEAN, STD
from milan.images.decode import decode_pixels
from milan.inference.predict import predict
from milan.models.export import save_encoder
from milan.models.segmenter import (
    SEGMENTER,
    Segmenter,
    build_head,
    create_encoder,
    load_segmenter,
    predict_masks,
    prepared,
    set_window,
)

VIT = {"patch_size": 8, "depth": 1, "embed_dim": 32, "num_heads": 2}


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """The folder of a segmentation of three classes, with drawn weights."""
    torch.manual_seed(0)
    vit = create_encoder("vit_tiny_patch16_224", VIT, size=32)
    set_window(vit, (32, 40))
    head = build_head("linear", vit, 3)
    torch.nn.init.normal_(head.conv.weight)
    segmenter = Segmenter(prepared(vit, head), head, window=(32, 40), frozen=True)
    about = {
        "model": "vit_tiny_patch16_224", "model_args": VIT, "mean": MEAN, "std": STD,
        "input_size": 32, "classes": ["grass", "disc", "box"], "protocol": "linear",
        "window": [32, 40], "native_size": 32, "decoder_width": None,
        "colours": [list(colour) for colour in SCENE_COLOURS],
    }  # fmt: skip
    (tmp_path / "run").mkdir()
    save_encoder(tmp_path / "run" / SEGMENTER, segmenter.state_dict(), about)
    return tmp_path / "run"


def test_masks_for_a_folder(trained: Path, tmp_path: Path, forked_ranks: None) -> None:
    """A PNG for each image, of its size, with the colours of the classes; shares in the table, by
    one rank and by two."""
    images = draw_masks(tmp_path / "scenes", count=5, split="a b") / "images"
    Image.new("RGB", (1, 1)).save(images / "a b/scene 00.jpg")
    broken = images / "a b/scene 03.jpg"
    broken.write_bytes(broken.read_bytes()[:100])
    Image.new("RGB", (200, 3)).save(images / "a b/strip.png")
    out = tmp_path / "found.parquet"
    metrics = predict(str(trained), data=str(images), out=str(out), batch_size=2, pictures=4)
    assert (metrics["images"], metrics["rejected_images"], metrics["classes"]) == (4, 2, 3)
    assert 'strip.png,"strip: 200 x 3 pixels' in out.with_suffix(".bad-images.csv").read_text()
    segmenter, table = load_segmenter(trained), pq.read_table(out).to_pylist()
    assert len(table) == 4
    for row in table:
        pixels = decode_pixels((images / row["key"]).read_bytes())
        (expected,) = predict_masks(segmenter, [pixels])
        mask = Image.open(row["mask"])
        assert (mask.mode, mask.size) == ("P", (row["width"], row["height"]))
        assert np.array_equal(np.asarray(mask), expected)
        best = int(np.bincount(expected.ravel()).argmax())
        assert row["class1"] == segmenter.class_names[best]
        assert row["share1"] == pytest.approx(float((expected == best).mean()))
        named = {row[f"class{n}"] for n in (1, 2, 3)} - {None}  # no class that has no pixel
        assert named == {segmenter.class_names[n] for n in np.unique(expected)}
        at = tuple(np.argwhere(expected == best)[0][::-1].tolist())
        assert mask.convert("RGB").getpixel(at) == SCENE_COLOURS[best]
    names = (Path(metrics["masks"]) / "classes.txt").read_text().split()
    assert names == segmenter.class_names
    assert Image.open(metrics["sheet"]).size[0] > 100
    ranked = predict(str(trained), data=str(images), out=str(tmp_path / "b/found.parquet"),
                     device="cpu", devices=2)  # fmt: skip
    assert ranked["classes_found"] == metrics["classes_found"]
    assert [{**row, "mask": ""} for row in pq.read_table(ranked["table"]).to_pylist()] == [
        {**row, "mask": ""} for row in table
    ]
