"""What is said while something is waited for, and when the wait ends."""

from __future__ import annotations

import signal
import socket
import time
from urllib.request import urlopen

import pytest
from helpers import Notes

from milan.core import waiting
from milan.core.signals import Stop
from milan.core.waiting import Stopped, Wait
from milan.errors import CacheError


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that time.monotonic() says, as its only item."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_a_wait_has_a_word_and_a_limit(clock: list[float]) -> None:
    """What it waits for, for how long, and what to do; ever more rarely; then one error."""
    notes = Notes()
    wait = Wait("rain", limit=100, fix="dance", progress=notes, error=CacheError)
    for _ in range(100):
        clock[0] += 1
        wait.check()
    assert [line.partition(" (")[0] for line in notes.lines] == [
        "waiting for rain, since 16.0 s", "waiting for rain, since 33.0 s",
        "waiting for rain, since 67.0 s",
    ]  # fmt: skip
    assert notes.lines[0].endswith("(at most 0:01:40); if it never comes: dance")
    clock[0] += 1
    with pytest.raises(CacheError, match=r"waited 0:01:41 in vain for rain.*try: dance"):
        wait.check()
    wait.restart()
    wait.check()


@pytest.mark.parametrize("grace", [0, 20])
def test_a_stop_ends_a_wait(grace: int, clock: list[float]) -> None:
    """At once, or when what was asked for might still have come."""
    stop = Stop()
    wait = Wait("rain", limit=100, fix="dance", stop=stop, grace=grace)
    clock[0] += 50
    wait.check()
    stop.request(signal.SIGTERM)
    for _ in range(grace):
        wait.check()
        clock[0] += 1
    with pytest.raises(Stopped, match="SIGTERM"):
        wait.check()


def test_a_download_that_stalls_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """urlopen alone, as torch's hub and open_clip call it, waits for ever."""
    monkeypatch.setattr(waiting, "_SILENCE", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}/weights"
        with pytest.raises(TimeoutError), waiting.stalled_connections_fail():
            urlopen(address)
    assert socket.getdefaulttimeout() is None
