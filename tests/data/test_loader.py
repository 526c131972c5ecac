"""How loader workers hand over batches, and what is said when one ends."""

from __future__ import annotations

import errno
import json
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import FORK, SMALL
from torch.utils._pytree import tree_leaves

from milan.core.signals import how_it_ended
from milan.data import loader
from milan.data.loader import Batch, FileChannel, SharedBatch
from milan.errors import TrainError
from milan.training.pretrain import pretrain

BATCH = Batch(
    torch.arange(2 * 5 * 5 * 3, dtype=torch.uint8).view(2, 5, 5, 3),
    torch.empty(0, 7),  # as of images without a box
    torch.rand(7, 2).T,  # its numbers do not lie in a row
    torch.tensor([3, 1 << 40]),
    torch.tensor([0, 1]),
    torch.randn(2, 8, 3).half(),
    None,
    others=((torch.randn(2, 5, 4), None),),
)


@pytest.fixture
def channel(monkeypatch: pytest.MonkeyPatch) -> Iterator[FileChannel]:
    """As between a loader worker and the training process."""
    channel = FileChannel()
    monkeypatch.setitem(SharedBatch.channels, -1, channel)
    yield channel
    channel.close()


def hand_over(channel: FileChannel) -> Batch:
    """BATCH, as the training process gets it."""
    return pickle.loads(pickle.dumps(SharedBatch(BATCH, -1, channel))).opened()


@pytest.mark.parametrize("memfd", [True, False])
def test_a_batch_arrives_as_it_was(
    memfd: bool, channel: FileChannel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through a nameless file in memory, or where there is none through one in shared memory."""
    if not memfd:
        monkeypatch.delattr(os, "memfd_create")
    arrived = hand_over(channel)
    for ours, theirs in zip(tree_leaves(arrived), tree_leaves(BATCH), strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None:
            assert ours.dtype == theirs.dtype
            assert torch.equal(ours, theirs)
            ours += 1  # its own memory, which may be written
    open_files = len(os.listdir("/proc/self/fd"))
    for _ in range(40):  # a file each, gone with the batch
        hand_over(channel)
    assert len(os.listdir("/proc/self/fd")) <= open_files
    # Two workers: the second one's file may be asked for first.
    one, two = (SharedBatch(BATCH, -1, channel) for _ in range(2))
    assert torch.equal(two.opened().rows, BATCH.rows)
    assert torch.equal(one.opened().rows, BATCH.rows)


def test_no_room_for_a_batch(channel: FileChannel, monkeypatch: pytest.MonkeyPatch) -> None:
    """One error with its size, and what gives room; in place of one that nobody receives."""

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(TrainError, match=r"hand over a batch of .* B: No space left") as error:
        SharedBatch(BATCH, -1, channel)
    assert "--shm-size" in error.value.fix


@pytest.mark.parametrize(
    ("ending", "said", "cause", "less_memory"),
    [
        (-signal.SIGKILL, "SIGKILL", "memory that is full", True),
        (-signal.SIGBUS, "SIGBUS", "shared memory", True),
        (-signal.SIGSEGV, "SIGSEGV", "memory was not the cause", False),
        (-signal.SIGABRT, "SIGABRT", "memory was not the cause", False),
        (-signal.SIGHUP, "SIGHUP", "somebody's signal", False),
        (-signal.SIGRTMIN - 3, f"signal {signal.SIGRTMIN + 3}", "somebody's signal", False),
        (1, "exit code 1", "printed above", False),
        (0, "exit code 0", "printed above", False),
    ],
)
def test_how_a_loader_worker_ended(
    ending: int, said: str, cause: str, less_memory: bool
) -> None:  # fmt: skip
    """Memory is blamed for what memory does, and for nothing else."""
    process = FORK.Process(target=end, args=(ending,))
    process.start()
    with pytest.raises(TrainError) as error:
        loader._raise_if_crashed([process])
    assert f"a loader worker crashed ({said}); likely cause: " in error.value.found
    assert cause in error.value.found
    assert ("less memory" in error.value.fix) == less_memory
    assert "goes on from the last checkpoint" in error.value.fix
    assert how_it_ended(process.exitcode)[0] == said


def test_no_room_for_locks(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shared memory is named, not the run's folder; no half-made loader complains."""

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("multiprocessing.synchronize.SemLock.__init__", full)
    with pytest.raises(TrainError, match=r"locks of 1 loader workers.*/dev/shm.*--num-workers 0"):
        pretrain(str(store), out=str(tmp_path / "run"), **SMALL | {"num_workers": 1})


def end(code: int) -> None:
    """This process, by a signal or an exit code."""
    if code < 0:
        signal.signal(-code, signal.SIG_DFL) if -code != signal.SIGKILL else None
        os.kill(os.getpid(), -code)
    os._exit(code)


SCRIPT = """
import json, sys, milan
settings = json.loads(sys.argv[3])
print(milan.pretrain(sys.argv[1], out=sys.argv[2], **settings)["finished"])
"""


@pytest.mark.soak
@pytest.mark.parametrize("settings", [{"num_workers": 2}, {"num_workers": 0, "devices": 2}])
def test_a_script_without_a_guard(settings: dict, store: Path, tmp_path: Path) -> None:
    """It calls milan.pretrain as it stands; workers and ranks do not begin the script again."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    given = json.dumps({**SMALL, "epochs": 1, **settings})
    done = subprocess.run(
        [sys.executable, script, store, tmp_path / "run", given],
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert (done.returncode, done.stdout.splitlines()[-1:]) == (0, ["True"]), done.stderr
    assert done.stdout.count("cache: ") == 1


def test_processes_do_not_import_the_users_script(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a started process is told about it: nothing; afterwards it is there again."""
    from multiprocessing.spawn import get_preparation_data

    from milan.core.signals import without_main_module

    main = sys.modules["__main__"]
    monkeypatch.setattr(main, "__file__", "/script.py", raising=False)
    monkeypatch.setattr(main, "__spec__", None, raising=False)
    assert "init_main_from_path" in get_preparation_data("x")
    with without_main_module():
        assert not [key for key in get_preparation_data("x") if "main" in key]
    assert sys.modules["__main__"] is main
