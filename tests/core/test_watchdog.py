"""A process that stands still in compiled code says so, and ends."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest
import torch
from helpers import FORK, Notes, forking_context, until

from milan.core import watchdog
from milan.core.distributed import Ranks, process_group
from milan.core.launch import launch
from milan.core.progress import Progress
from milan.core.signals import ONE_PRESS, STOPPING, Stop, on_stop_signals
from milan.core.waiting import Stopped, Wait
from milan.core.watchdog import unwatched, watched


def hang() -> None:
    """In compiled code that no signal interrupts: a lock that this thread has."""
    libc, lock = ctypes.CDLL(None), ctypes.create_string_buffer(64)
    libc.pthread_mutex_lock(lock)
    libc.pthread_mutex_lock(lock)


def read_for_ever() -> None:
    """In a read that hears a signal, and goes on."""
    os.read(os.pipe()[0], 1)


def short(**seconds: float) -> None:
    """Shorten the watchdog's times in this process."""
    for name, value in {"_PERIOD": 0.05, "_SOON": 0.2, "_AGAIN": 0.1, **seconds}.items():
        setattr(watchdog, name, value)


def stand(act: Callable[[], None], stops: bool, said: str, seconds: dict[str, float]) -> None:
    """A process that stands still in `act`; what it says is in the file `said`."""
    os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT), 2)
    # A loader that started the fork server blocked them.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
    short(**seconds)
    stop = Stop()
    stop.kept = "the checkpoint of step 7 stays"
    with (
        on_stop_signals(stop.request) if stops else nullcontext(),
        watched(stop if stops else None, rank=3 if stops else None),
    ):
        Path(said).with_suffix(".ready").touch()
        act()


@pytest.mark.parametrize(
    ("act", "stops", "numbers", "seconds", "code", "words"),
    [
        (hang, True, [signal.SIGTERM], {"HEARD": 0.3}, 75, "SIGTERM: rank 3: since"),
        (read_for_ever, True, [signal.SIGTERM], {"HEARD": 0.3}, 75, "SIGTERM: rank 3: since"),
        (hang, True, [signal.SIGINT] * 2, {}, 130, "a second Ctrl-C; rank 3: since"),
        (hang, True, [], {"LIMIT": 0.3}, 1, "rank 3: since"),
        (hang, False, [signal.SIGINT], {"HEARD": 0.3}, 130, "SIGINT: since"),
    ],
)
def test_a_process_that_stands_still_ends(
    act: Any, stops: bool, numbers: list[int], seconds: dict[str, float], code: int, words: str,
    tmp_path: Path,
) -> None:  # fmt: skip
    """With the documented code, and a line that says where it stood and what is kept."""
    said = tmp_path / "said"
    process = FORK.Process(target=stand, args=(act, stops, str(said), seconds))
    process.start()
    until(said.with_suffix(".ready").exists)
    for again, number in enumerate(numbers):
        time.sleep(1.2 * ONE_PRESS if again else 0.05)
        os.kill(process.pid or 0, number)
    process.join(20)
    process.kill()
    *_, last = said.read_text().splitlines()
    assert process.exitcode == code, last
    assert last.startswith(f"milan: {words}"), last
    assert "tests/core/test_watchdog.py, line" in last
    assert f"({act.__name__})" in last
    assert last.endswith("the same line goes on")
    assert ("the checkpoint of step 7 stays" in last) == stops


def test_what_moves_is_left_alone(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    """Python code, short calls, waits that check themselves, and a person who thinks."""
    for name, value in {"_PERIOD": 0.01, "_FIRST_WORD": 0.7, "LIMIT": 5.0}.items():
        monkeypatch.setattr(watchdog, name, value)
    wait = Wait("rain", limit=100, fix="dance")
    with watched():
        for _ in range(50):
            wait.check()
            time.sleep(0.02)
        for _ in range(50):
            Event().wait(0.02)
        with unwatched():
            time.sleep(1)
    assert not caplog.records


def stuck_rank(stop: Stop, progress: Progress) -> None:
    """Rank 1 stands still; rank 0 waits for it in a collective."""
    short(HEARD=0.5)
    ranks = Ranks.from_environment()
    assert ranks is not None
    with watched(stop, rank=ranks.rank), process_group(ranks, torch.device("cpu"), stop=stop):
        if ranks.rank:
            hang()
        progress.note("waits")
        ranks.any_flags(1)


def test_ranks_that_wait_for_one_another_hear_a_signal(
    monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    """Both end, and the launcher takes it for a stop, not for a crash that is restarted."""
    monkeypatch.setattr("multiprocessing.get_context", forking_context)
    notes = Notes()
    killed = Thread(
        target=lambda: (until(lambda: notes.lines), time.sleep(0.2), os.kill(os.getpid(), 15))
    )
    killed.start()
    with pytest.raises(Stopped, match="SIGTERM"):
        launch(stuck_rank, {}, ranks=2, restarts=3, restart_arguments=dict, progress=notes)
    killed.join()
    assert "exit code 75" in notes.lines[-1]
    assert notes.lines[-1].endswith("asked to stop by SIGTERM")
