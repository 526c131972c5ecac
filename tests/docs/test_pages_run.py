"""The command and Python blocks of README and docs, run from top to bottom of each page.

What a reader has before a page begins (data under the names that it uses, a store, runs) is drawn
small by `home`. The tables below say what else differs from what a reader types.
"""

from __future__ import annotations

import contextlib
import io
import re
import shutil
import sys
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest
from doc_blocks import PAGES, ROOT, Block, blocks_of, simple_commands
from helpers import draw_masks, draw_scenes, make_photos, run_here

from milan.store import codecs

pytestmark = pytest.mark.soak

WEIGHTS = "--pretrained demo/teacher/model.safetensors"
TEACHER = f"--teacher demo/teacher/config.json {WEIGHTS}"
IN_PLACE_OF = {
    "--teacher timm:vit_xsmall_patch16_clip_224.tinyclip_yfcc15m": "",  # then the demo's
    "--pretrained none": WEIGHTS,
    "timm:vit_base_patch16_224.mae": "runs/other",
    "timm:vit_small_patch14_dinov2.lvd142m": "runs/other",
    "/network/": "network/",
    "/nvme/": "nvme/",
    "~/Pictures": "photos",
}
"""Weights of the hub and places of a cluster -> what is here."""
SMALL = {
    "doctor": TEACHER,
    "extract-targets": f"{TEACHER} --executor local --limit 24 --views 1",
    "pretrain": "--epochs 1 --warmup-epochs 0 --batch-size 8 --num-workers 0 "
    "--set model.patch_size=4 --set model.embed_dim=32 --set model.depth=12 "
    "--set model.num_heads=2 "
    "--set decoder.embed_dim=32 --set decoder.depth=1 --set decoder.num_heads=2",
    "finetune": "--epochs 1 --warmup-epochs 0 --batch-size 8",
    "segment": "--epochs 1 --warmup-epochs 0 --batch-size 4 --size 28 --width 28 --channels 16",
    "detect": "--epochs 1 --warmup-epochs 0 --batch-size 4 --size 128 --width 16",
    "zero-shot": "--limit 24",
}
"""Settings that make a command small, in place of those of the page."""
MAKES = {"extract-targets": "targets.zarr", "pretrain": "runs/pretrain"}
"""What a command makes where it is told no other place."""
ELSEWHERE = {
    "docs/python.md": "tests/test_python_api.py",
    "docs/cache-format.md": "tests/store/test_format.py",
}
"""Python blocks that another test runs, and compares what they give."""
BEFORE = {
    "docs/extending.md": (
        "from dataclasses import dataclass\nimport torch\n"
        "from milan.evaluation.protocols import Column, Protocol\n"
        "from milan.store.codecs import CODECS, Codec\n"
    )
}
"""Imports of the files into which the parts of programs on a page go."""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a reader has: the checkout's demo, data, a store, runs, and what was trained further."""
    here = tmp_path_factory.mktemp("home")
    for name in ("demo", "params.yaml"):
        (here / name).symlink_to(ROOT / name)
    data = here / "data"
    for folder in ("imagenet/train", "imagenet/test", "cifar10", "imagenet-sample"):
        make_photos(data / folder, seed=len(folder))
    make_photos(data / "imagenet/val", count=12, seed=5)
    for path in data.glob("**/class *"):  # classes whose names are words, for zero-shot
        path.rename(path.with_name(("dog", "cat", "sock")[int(path.name[-1])]))
    shutil.copytree(data / "cifar10", here / "photos")
    shutil.copy(next((here / "photos").glob("*/*.jpg")), here / "a.jpg")
    shutil.copy(next((data / "imagenet/train").glob("*/*.jpg")), here / "photos/dog.jpg")
    (data / "pairs").mkdir()
    (data / "pairs/pairs.parquet").symlink_to(ROOT / "demo/data/test.parquet")
    draw_scenes(data / "coco")
    for seed, split in enumerate(("train", "valid")):
        scenes = draw_scenes(data / "bccd" / split, seed=seed, count=8)
        (scenes / "annotations.json").rename(scenes / "_annotations.coco.json")
    for name, splits in (("ade20k", ("training", "validation")), ("camvid", ("train", "val"))):
        for seed, split in enumerate(splits):
            draw_masks(data / name, split=split, seed=seed, count=6)
    (here / "camvid.txt").write_text("".join(f"class {n}\n" for n in range(11)))
    shutil.copy(next((data / "camvid/images/train").glob("*.jpg")), here / "street.jpg")
    for line in (
        "extract-targets --data imagenet --texts",
        "pretrain --cache targets.zarr",
        *(f"pretrain --cache targets.zarr --out runs/{name}" for name in ("a", "b", "other")),
        "finetune --data imagenet",
    ):
        typed(["milan", *line.split()], here)
    (here / "network").mkdir()
    shutil.copytree(here / "targets.zarr", here / "network/targets.zarr")
    return here


def typed(words: list[str], here: Path) -> None:
    """Run a simple command that a page has."""
    if words[:2] == ["python", "-c"]:
        with contextlib.chdir(here), contextlib.redirect_stdout(io.StringIO()) as out:
            exec(compile(words[2], "-c", "exec"), {})
        assert out.getvalue()
        return
    assert words[0] == "milan", f"not known how to run: {' '.join(words)}"
    ran = run_here(*made_small(words[1:]), cwd=here)
    assert ran.code == 0, f"{' '.join(words)}\n{ran.out[-1500:]}\n{ran.err}"


def made_small(words: list[str]) -> list[str]:
    """The words of a command, with the settings that make it small in place of its own."""
    small = flags_of(SMALL.get(words[0], "").split())
    own = [flag for flag in flags_of(words) if name_of(flag) not in map(name_of, small)]
    return [word for flag in (*own, *small) for word in flag]


def flags_of(words: list[str]) -> list[list[str]]:
    """Each flag of a command with its values; what stands before them is the first."""
    starts = [n for n, word in enumerate(words) if not n or word.startswith("--")]
    return [words[a:b] for a, b in pairwise([*starts, len(words)])]


def name_of(flag: list[str]) -> str:
    """Of --set with its key."""
    return " ".join(flag[:2]).partition("=")[0] if flag[0] == "--set" else flag[0]


def run_block(block: Block, here: Path, made: set[str]) -> None:
    """Run a block in the page's folder; `made` is what the page has made so far."""
    if block.language in ("sh", "bash"):
        text = block.text
        for theirs, ours in IN_PLACE_OF.items():
            text = text.replace(theirs, ours)
        for words in simple_commands(text):
            out = words[words.index("--out") + 1] if "--out" in words else MAKES.get(words[1], "")
            if words[1] in MAKES and out not in made:
                shutil.rmtree(here / out, ignore_errors=True)  # it is the page's from here on
                made.add(out)
            typed(words, here)
    elif block.page not in ELSEWHERE:
        with contextlib.chdir(here), contextlib.redirect_stdout(io.StringIO()):
            code = BEFORE.get(block.page, "") + block.text
            exec(compile(code, block.place, "exec"), {"__name__": "__main__"})


def runnable(page: Path) -> list[Block]:
    """Blocks that run: all but those that say that they need what a test has not."""
    kinds = ("sh", "bash", "python", "py")
    return [block for block in blocks_of(page) if block.language in kinds and not block.needs]


@pytest.mark.parametrize("page", [p for p in PAGES if runnable(p)], ids=lambda p: p.stem)
def test_a_page_runs(
    page: Path, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each block after the other, in a folder as a reader has it."""
    here = tmp_path / "home"
    shutil.copytree(home, here, symlinks=True)
    library = ModuleType("mylibrary")
    monkeypatch.setitem(sys.modules, "mylibrary", library)
    monkeypatch.setattr(codecs, "CODECS", dict(codecs.CODECS))
    made = set[str]()
    for block in runnable(page):
        try:
            run_block(block, here, made)
        except Exception as error:
            raise AssertionError(f"{block.place}: {error}") from error


def test_tables_are_in_use() -> None:
    """A word that no page has any more stands in no table; the other tests read their pages."""
    every = "".join(page.read_text() for page in PAGES)
    assert [words for words in IN_PLACE_OF if words not in every] == []
    for page, test in ELSEWHERE.items():
        assert f'"{page}"' in (ROOT / test).read_text()
    commands = set(re.findall(r"milan ([a-z-]+)", every))
    assert set(SMALL) <= commands
