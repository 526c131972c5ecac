"""What the tests share: a small real teacher, real JPEGs, a finished store, the shared data."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import chdir, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

# Models here are tiny: a second thread costs more at its barriers than it brings, above all where
# several processes share the cores. Set before torch is imported; subprocesses inherit it.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from milan.core import remote
from milan.store.cache import TargetCache
from pipeline.extract import extract_targets

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "data"

TEACHER = {
    "embed_dim": 24,
    "quick_gelu": True,
    "vision_cfg": {
        "image_size": 32, "layers": 2, "width": 32, "patch_size": 8, "head_width": 16
    },
    "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1},
}  # fmt: skip
STUDENT = {
    "model_args": {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2},
    "decoder": {"embed_dim": 16, "depth": 2, "num_heads": 2},
}
"""A student that fits TEACHER's grid of 4 x 4 patches."""


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Small tensors gain nothing from more threads, and lose much on a busy machine."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def teacher_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A small CLIP on disk, weights drawn by a seed: `teacher` and `pretrained` of the commands.

    2-D weights are doubled, or the attention of random weights would be nearly flat.
    """
    import open_clip

    folder = tmp_path_factory.mktemp("teacher")
    (folder / "config.json").write_text(json.dumps(TEACHER))
    torch.manual_seed(1)
    model = open_clip.CLIP(**TEACHER)
    state = {k: v * 2 if v.ndim == 2 else v for k, v in model.state_dict().items()}
    save_file({k: v.contiguous().clone() for k, v in state.items()}, folder / "model.safetensors")
    return {
        "teacher": str(folder / "config.json"),
        "pretrained": str(folder / "model.safetensors"),
    }


def make_photos(folder: Path, *, count: int = 24, classes: int = 3, seed: int = 0) -> Path:
    """Class folders of JPEGs: smooth random pictures of several sizes, 40 to 120 pixels."""
    generator = np.random.default_rng(seed)
    for i in range(count):
        height, width = generator.integers(40, 121, 2)
        coarse = generator.integers(0, 256, (5, 7, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((int(width), int(height)), Image.Resampling.BICUBIC)
        path = folder / f"class {i % classes}" / f"bild {i:02d} ü.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, quality=90)
    return folder


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 JPEGs in 3 class folders; not to be changed by a test."""
    return make_photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="session")
def store(
    tmp_path_factory: pytest.TempPathFactory, photos: Path, teacher_files: dict[str, str]
) -> Path:
    """A finished int8 store of `photos`: 24 rows, 2 views, shards of 8 rows; not to be changed."""
    path = tmp_path_factory.mktemp("store") / "targets.zarr"
    extract_targets(
        str(photos), out=str(path), views=2, shard_size=8, batch_size=7, executor="local",
        **teacher_files,
    )  # fmt: skip
    return path


@pytest.fixture(scope="session")
def cache(store: Path) -> TargetCache:
    """`store`, opened."""
    return TargetCache(store)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """CIFAR-10 and ImageNet photographs beside the checkout; tests of them skip where absent."""
    if not SHARED.exists():
        pytest.skip("../shared/data is absent: CIFAR-10 and ImageNet photographs are not tested")
    return SHARED


@pytest.fixture(scope="session")
def milan() -> Callable[..., subprocess.CompletedProcess]:
    """Run the installed `milan` command: milan("pretrain", "--cache", path, cwd=...)."""
    command = Path(sys.executable).parent / "milan"

    def run(
        *arguments: object, cwd: Path | None = None, env: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess:
        return subprocess.run(
            [str(command), *map(str, arguments)],
            cwd=cwd,
            env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
            capture_output=True,
            text=True,
            timeout=300,
        )

    return run


def tree(root: Path) -> dict[str, bytes]:
    """The files of a store that must not vary between runs: arrays, records, manifest, index."""
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file()
        and not path.relative_to(root).as_posix().startswith((".staging", ".lock", "extract.log"))
    }


def forget() -> None:
    """Drop connections to buckets and what they know, as in a new process."""
    import fsspec

    remote._filesystem.cache_clear()
    fsspec.get_filesystem_class("s3").clear_instance_cache()


class Ran(NamedTuple):
    """What a command run in this process did."""

    code: int
    out: str
    err: str


def run_here(*arguments: object, cwd: Path | None = None) -> Ran:
    """`milan` with `arguments`, by its entry point in this process: torch is loaded only once.

    For tests of what a command does and says; those of the process itself use `milan`.
    """
    from stages import cli

    torch.set_num_threads(1)
    out, err, before = io.StringIO(), io.StringIO(), sys.argv
    sys.argv, code = ["milan", *map(str, arguments)], 0
    try:
        with chdir(cwd or Path.cwd()), redirect_stdout(out), redirect_stderr(err):
            cli.main()
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else int(left.code is not None)
    finally:
        sys.argv = before
    return Ran(code, out.getvalue(), err.getvalue())
