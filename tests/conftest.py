"""Fixtures that many tests share: a small real teacher, real JPEGs, finished stores and runs.

They import torch and more themselves: pytest-xdist's own process reads this file and runs no test.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from multiprocessing import forkserver
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from browser import Browser

    from milan.store.cache import TargetCache

pytest_plugins = ["s3"]

# Models here are tiny: a second thread costs more at its barriers than it brings, above all where
# several processes share the cores. Set before torch is imported; subprocesses inherit it.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that start many processes come first, so that no worker is left alone with one."""
    first = ("cluster", "promises", "stages")
    items.sort(key=lambda item: item.path.parent.name not in first)


def pytest_configure() -> None:
    """A shell has SIGINT ignored in the background, and so would all that the tests start."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def one_fork_server() -> None:
    """One for all tests of this process: it takes ten seconds to import everything."""
    from helpers import prepare_fork_server

    prepare_fork_server()


@pytest.fixture
def forked_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks that this process starts are forks: what they do is tested, not how they start."""
    from helpers import forking_context

    forkserver.ensure_running()  # before signals are blocked, which its forks would inherit
    monkeypatch.setattr(multiprocessing, "get_context", forking_context)


@pytest.fixture(autouse=True)
def short_pauses() -> Iterator[None]:
    """Errors that pass are tried as often as ever, but not waited for."""
    from milan.core import retry

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retry, "PAUSES", (0.001,) * len(retry.PAUSES))
        yield


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Small tensors gain nothing from more threads, and lose much on a busy machine."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def teacher_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A small CLIP on disk, weights drawn by a seed: `teacher` and `pretrained` of the commands.

    2-D weights are doubled, or the attention of random weights would be nearly flat.
    """
    import open_clip
    import torch
    from helpers import TEACHER
    from safetensors.torch import save_file

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


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 JPEGs in 3 class folders; not to be changed by a test."""
    from helpers import make_photos

    return make_photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="session")
def finished_store(
    tmp_path_factory: pytest.TempPathFactory, photos: Path, teacher_files: dict[str, str]
) -> Callable[..., Path]:
    """finished_store(codec="float16") -> a store of `photos`: 24 rows, shards of 8, 2 views, int8.

    Made once for each set of `changes`; not to be changed by a test, which copies it first.
    """
    import torch
    from helpers import EXTRACTION

    from pipeline.extract import extract_targets

    stores: dict[str, Path] = {}

    def make(**changes: Any) -> Path:
        key = repr(sorted(changes.items()))
        if key not in stores:
            torch.set_num_threads(1)
            stores[key] = tmp_path_factory.mktemp("store") / "targets.zarr"
            settings = {**EXTRACTION, **teacher_files, **changes}
            extract_targets(str(photos), out=str(stores[key]), **settings)
        return stores[key]

    return make


@pytest.fixture(scope="session")
def store(finished_store: Callable[..., Path]) -> Path:
    """A finished int8 store of `photos`: 24 rows, 2 views, shards of 8 rows; not to be changed."""
    return finished_store()


@pytest.fixture
def copy(store: Path, tmp_path: Path) -> Path:
    """A copy of `store`, to be damaged; its images are found where they were."""
    shutil.copytree(store, tmp_path / "copy.zarr")
    return tmp_path / "copy.zarr"


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory, store: Path) -> Callable[..., Path]:
    """finished_run(epochs=2) -> the folder of an uninterrupted run of SMALL on `store`.

    Made once for each set of `changes`; not to be changed by a test, which copies it first.
    """
    import torch
    from helpers import SMALL

    from milan.training.pretrain import pretrain

    runs: dict[str, Path] = {}

    def make(**changes: Any) -> Path:
        settings = {**SMALL, **changes}
        key = repr(sorted(settings.items()))
        if key not in runs:
            torch.set_num_threads(1)
            runs[key] = tmp_path_factory.mktemp("finished") / "run"
            pretrain(str(store), out=str(runs[key]), **settings)
        return runs[key]

    return make


@pytest.fixture(scope="session")
def cache(store: Path) -> TargetCache:
    """`store`, opened."""
    from milan.store.cache import TargetCache

    return TargetCache(store)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """CIFAR-10 and ImageNet photographs beside the checkout; tests of them skip where absent."""
    from helpers import SHARED

    if not SHARED.exists():
        pytest.skip("../shared/data is absent: CIFAR-10 and ImageNet photographs are not tested")
    return SHARED


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """Chromium without a window; tests of pages skip where it is absent."""
    from browser import Browser, find_browser

    program = find_browser()
    if not program:
        pytest.skip("no Chromium on this machine: pages are not looked at (apt install chromium)")
    opened = Browser(program, tmp_path_factory.mktemp("browser"))
    yield opened
    opened.close()


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
