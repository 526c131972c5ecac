"""The sentences nearest to masked patches: shares as the towers give them, a page, and refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pyarrow.parquet as pq
import pytest
import torch
from helpers import ROOT, run_here
from PIL import Image
from torch.nn import functional as F

import milan
from milan.core.device import MEAN, STD, normalise
from milan.errors import MilanError
from milan.models.rils import load_rils
from milan.store.cache import TargetCache
from milan.training.sentence_sheet import named_patches, sentence_sheet
from milan.training.trained import load_student
from pipeline.extract import extract_targets

DEMO = ROOT / "demo" / "teacher"
RUN: dict[str, Any] = {
    "epochs": 1, "batch_size": 8, "num_workers": 0, "report_to": "none", "picture_every": 9,
    "held_out": 0.34, "model_args": {"patch_size": 4, "embed_dim": 32, "depth": 1, "num_heads": 2},
    "decoder": {"embed_dim": 32, "depth": 1, "num_heads": 2},
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of 24 clothes with texts (t.zarr), and a run of rils."""
    folder = tmp_path_factory.mktemp("sheet")
    (folder / "data").mkdir()
    pq.write_table(pq.read_table(ROOT / "demo/data/test.parquet")[:24], folder / "data/a.parquet")
    extract_targets(
        str(folder / "data"), out=str(folder / "t.zarr"), views=1, executor="local",
        texts=True, teacher=str(DEMO / "config.json"), pretrained=str(DEMO / "model.safetensors"),
    )  # fmt: skip
    milan.pretrain(str(folder / "t.zarr"), out=str(folder / "rils"), objective="rils", **RUN)
    return folder


@pytest.mark.parametrize("name", ["rils", pytest.param("rils-cached", marks=pytest.mark.soak)])
def test_shares_are_those_of_the_towers(place: Path, name: str) -> None:
    """Of two sentences that are named: exp of the difference of their cosines over temperature."""
    if name != "rils":
        milan.pretrain(str(place / "t.zarr"), out=str(place / name), objective=name, **RUN)
    told, _ = named_patches(place / name, images=3)
    assert len(told) == 3
    tokenizer = open_clip.SimpleTokenizer(context_length=24)
    cache = TargetCache(place / "t.zarr")
    for one in told:
        assert one.masked[one.patch]
        assert len(one.target) == len(one.student) == 5
        shares = [share for _, share in one.target]
        assert shares == sorted(shares, reverse=True)
        sentences = [sentence for sentence, _ in one.target]
        if name == "rils":
            student = load_rils(place / name / "rils.safetensors")
            images = normalise(torch.from_numpy(one.pixels[None]), MEAN, STD)
            with torch.inference_mode():
                patch = student.encode_patches(images)[0, one.patch]
                texts, tau = student.text(tokenizer(sentences)), 0.04
        else:
            row = int(one.name.split(",")[0].removeprefix("row "))
            targets = cache.read(np.array([row]), np.array([0]))
            codes, scale = (torch.from_numpy(x) for x in (targets.codes, targets.scale))
            patch = cache.codec.decode(codes, scale)[0, 1 + one.patch]
            ids = cache.token_ids(cache.captioned)[:, 0].tolist()
            rows = [cache.captioned[ids.index(i)] for i in tokenizer(sentences).tolist()]
            features = cache.texts(np.sort(rows)).features[np.argsort(np.argsort(rows))]
            texts, tau = torch.from_numpy(features), load_tau(place / name)
        cosines = F.normalize(texts, dim=1) @ F.normalize(patch, dim=0)
        expected = ((cosines - cosines[0]) / tau).exp().numpy()
        np.testing.assert_allclose(np.array(shares) / shares[0], expected, rtol=2e-3)


def load_tau(run: Path) -> float:
    """The teacher's temperature of a rils-cached run, as the legend has it, but whole."""
    from milan.config import PretrainConfig
    from milan.objectives.rils_cached import CachedSentences

    store = load_student(run).store
    config = PretrainConfig(objective="rils-cached", cache=store)
    objective = CachedSentences(
        TargetCache(store), masking="random", mask_ratio=0.75, config=config
    )
    return objective.teacher_tau


def test_the_command_draws_it(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`milan visualise` of a run is this page; of its store it is the other sheet."""
    monkeypatch.chdir(place)
    ran = run_here("visualise", "rils", "--images", 2, "--out", "said.png")
    assert ran.code == 0, ran.err
    with Image.open("said.png") as page:
        assert page.width > 1000
        red = (np.asarray(page) == (230, 25, 75)).all(axis=2)
        assert red.sum() > 200


@pytest.mark.soak
@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"objective": "milan"}, "objective milan; expected: rils or rils-cached"),
        ({"objective": "rils", "objective_args": {"weight": 0}}, "is plain CLIP"),
    ],
)
def test_other_runs(place: Path, tmp_path: Path, settings: dict[str, Any], expected: str) -> None:
    """One line."""
    run = tmp_path / "run"
    milan.pretrain(str(place / "t.zarr"), out=str(run), stop_after=1, **RUN | settings)
    with pytest.raises(MilanError, match=expected) as error:
        sentence_sheet(run, out=tmp_path / "said.png")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "said.png").exists()
