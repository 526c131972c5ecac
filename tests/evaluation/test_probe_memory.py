"""Soak: evaluations take no more memory for more images."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import FORK

from milan.evaluation.evaluate import Evaluation
from milan.evaluation.features import Context, Features, Labelled, _File, _Files
from milan.evaluation.frozen import Frozen
from milan.evaluation.protocols import PROTOCOLS, EvaluationConfig

WIDTH, CLASSES = 512, 5
FROZEN = [n for n, p in PROTOCOLS.items() if issubclass(p.settings, EvaluationConfig)]


def kept(folder: Path, images: int) -> Labelled:
    """Features of random images, as an extraction would have left them."""
    folder.mkdir()
    files, generator = _Files(folder, "key", images), torch.Generator().manual_seed(0)
    for number, rows in enumerate(files.ranges):
        x = torch.randn(len(rows), WIDTH, generator=generator)
        x[:, 0] += torch.from_numpy(rows % CLASSES)
        files.write(number, _File(x, rows, rows.astype(np.uint64), []))
    return Labelled(Features(files, "random"), np.arange(images), np.arange(images) % CLASSES)


def anonymous() -> int:
    """Bytes of this process that no file backs."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("RssAnon:")[2].split()[0])


def peak_of(protocol: str, folder: str, images: int, answer: str) -> None:
    """Run a protocol in this process; writes how many bytes more it took at its peak."""
    torch.set_num_threads(1)
    train, val = kept(Path(folder, "train"), images), kept(Path(folder, "val"), 2000)
    declared = PROTOCOLS[protocol]
    settings = declared.settings(memory="1 MB")
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
@pytest.mark.parametrize("protocol", FROZEN)
def test_memory_does_not_grow_with_the_images(protocol: str, tmp_path: Path) -> None:
    """Four times the images, 100 MB more of features: the same memory, but for noise."""
    peaks = []
    for images in (16_384, 65_536):  # fewer would not fill the buffers
        (tmp_path / str(images)).mkdir()
        answer = tmp_path / f"{images}.txt"
        arguments = (protocol, str(tmp_path / str(images)), images, str(answer))
        process = FORK.Process(target=peak_of, args=arguments)
        process.start()
        process.join(600)
        assert process.exitcode == 0
        peaks.append(int(answer.read_text()))
    assert peaks[1] < peaks[0] + 50e6, peaks  # half of what the features take
