"""Soak: evaluations take no more memory for more images."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import FORK

from milan.evaluation.config import EvaluationConfig
from milan.evaluation.evaluation import Evaluation
from milan.evaluation.features import Context, Features, File, Labelled, _Files
from milan.evaluation.frozen import Frozen
from milan.evaluation.protocols import PROTOCOLS

WIDTH, CLASSES = 512, 5
FROZEN: list[tuple[str, dict[str, Any]]] = [
    *((n, {}) for n, p in PROTOCOLS.items() if issubclass(p.settings, EvaluationConfig)),
    *(("linear_probe", {"protocol": p, "epochs": 2}) for p in ("published", "dinov2")),
]


def kept(folder: Path, images: int, protocol: str) -> Labelled:
    """Features of random images, or 4 patches of each, as an evaluation would have left them."""
    folder.mkdir()
    patches = PROTOCOLS[protocol].settings().feature_set == "patches"  # type: ignore[attr-defined]
    files = _Files(folder, "key", images, 256 if patches else 2048)
    generator = torch.Generator().manual_seed(0)
    for number, rows in enumerate(files.ranges):
        x = torch.randn(len(rows), WIDTH, generator=generator)
        x[:, 0] += torch.from_numpy(rows % CLASSES)
        x = x.view(len(x), 4, -1).half() if patches else x
        files.write(number, File(x, rows, rows.astype(np.uint64), []))
    return Labelled(Features(files, "random"), np.arange(images), np.arange(images) % CLASSES)


def anonymous() -> int:
    """Bytes of this process that no file backs."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("RssAnon:")[2].split()[0])


def peak_of(protocol: str, changes: dict[str, Any], folder: str, images: int, answer: str) -> None:
    """Run a protocol in this process; writes how many bytes more it took at its peak."""
    torch.set_num_threads(1)
    train, val = (
        kept(Path(folder, name), count, protocol)
        for name, count in (("train", images), ("val", 2000))
    )
    declared = PROTOCOLS[protocol]
    if protocol == "attentive_probe":
        changes = {"epochs": 1}
    settings = declared.settings(memory="1 MB", **changes)
    network = Frozen(lambda pixels: pixels, 8, "random")
    evaluation = Evaluation(settings, network, train, val, CLASSES, Context(torch.device("cpu")))
    run, peak, over = declared.load(), [0], threading.Event()
    before = anonymous()

    def watch() -> None:
        while not over.is_set():
            peak[0] = max(peak[0], anonymous() - before)
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    run(evaluation)
    over.set()
    watcher.join()
    Path(answer).write_text(str(peak[0]))


@pytest.mark.soak
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.parametrize(("protocol", "changes"), FROZEN, ids=str)
def test_memory_does_not_grow_with_the_images(
    protocol: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    """Four times the images, 100 MB more of features: the same memory, but for noise."""
    peaks = []
    for images in (16_384, 65_536):  # fewer would not fill the buffers
        (tmp_path / str(images)).mkdir()
        answer = tmp_path / f"{images}.txt"
        arguments = (protocol, changes, str(tmp_path / str(images)), images, str(answer))
        process = FORK.Process(target=peak_of, args=arguments)
        process.start()
        process.join(600)
        assert process.exitcode == 0
        peaks.append(int(answer.read_text()))
    assert peaks[1] < peaks[0] + 50e6, peaks  # half of what the features take
