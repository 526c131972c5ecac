"""The lock of a store in a bucket: an object that its owner keeps putting anew.

It says who holds it and for how many seconds it counts after it was put. Whether these are over is
told by the server's clock alone, and an expired one is taken over on condition that it is still the
same object. The owner counts by its own clock from before each request, so that it gives up first.
"""

from __future__ import annotations

import json
import os
import socket
import time
from threading import Event, Thread
from typing import Any

from milan.core.paths import Url
from milan.errors import CacheError, MilanError
from pipeline.writing.s3 import ObjectInfo, get, put

SECONDS = 60.0
"""How long a lock counts without renewal: a store waits so long for a driver that was killed."""
_RENEWALS = 4  # in that time
_MARGIN = 2.0  # seconds before the end, in which the owner no longer trusts it: the server counts
# in whole seconds, and clocks drift


class Lease:
    """A lock that this process holds and renews until `close`, or until it is lost."""

    def __init__(self, store: Url, run: str) -> None:
        """Take the lock. Raises CacheError, naming the holder, if another process has it."""
        self.store, self.where, self.run = store, store / ".lock", run
        self.seconds, self.renewals = SECONDS, 0
        self.until, self.lost = 0.0, ""
        self.etag = self._take()
        self._check_server()
        self._ended = Event()
        self._thread = Thread(target=self._renew, daemon=True, name="lease")
        self._thread.start()

    def check(self) -> None:
        """Raises CacheError if the lock is no longer ours: nothing more may be committed."""
        if not self._ours():
            raise CacheError(
                f"the lock of {self.store} {self.lost}",
                expected="a lock that is held to the end",
                fix="run the same line again: what is committed stays",
            )

    def close(self) -> None:
        """Give it back: from now on anybody may have it."""
        self._ended.set()
        self._thread.join()
        if self._ours():
            self.seconds = 0.0
            put(self.where, self._text(), over=self.etag)

    def _ours(self) -> bool:
        if not self.lost and _now() > self.until:
            self.lost = f"could not be renewed for {self.seconds:g} s"
        return not self.lost

    def _take(self) -> str:
        began, found = _now(), get(self.where)
        if found and not _expired(*found):
            raise self._in_use(*found)
        etag = put(self.where, self._text(), over=found[1].etag if found else None)
        if etag is None:  # another was faster
            raise self._in_use(*(get(self.where) or (b"", None)))
        self.until = began + self.seconds - _MARGIN
        return etag

    def _check_server(self) -> None:
        """Raises CacheError unless the server keeps to conditions: without them nothing is safe."""
        nothing = self._text() + b" "
        if put(self.where, nothing, over=None) or put(self.where, nothing, over='"none"'):
            raise CacheError(
                f"the server of {self.store} ignores the conditions of a PUT",
                expected="S3 with If-None-Match and If-Match",
                fix="another server or a newer one; pip install --upgrade s3fs botocore",
            )

    def _renew(self) -> None:
        answered, began = True, 0.0
        while not self._ended.wait(self.seconds / _RENEWALS) and self._ours():
            if answered:  # else the same again, and as old: the request may have arrived
                began, self.renewals = _now(), self.renewals + 1
            try:
                answered = False
                etag = put(self.where, self._text(), over=self.etag)
                answered = True
            except MilanError:
                continue
            if etag is None:
                self.lost = f"was taken over by {self._holder()}"
                return
            self.etag, self.until = etag, began + self.seconds - _MARGIN

    def _text(self) -> bytes:
        owner = f"pid {os.getpid()} on {socket.gethostname()}"
        told = {"owner": owner, "run": self.run, "seconds": self.seconds, "renewed": self.renewals}
        return json.dumps(told).encode()

    def _holder(self) -> str:
        try:
            found = get(self.where)
        except MilanError:
            found = None
        return _read(found[0]).get("owner", "nobody") if found else "nobody"

    def _in_use(self, text: bytes, held: ObjectInfo | None) -> CacheError:
        told = _read(text)
        left = max(0.0, told.get("seconds", 0.0) - held.age) if held else 0.0
        return CacheError(
            f"{self.store} is in use by {told.get('owner', 'another process')}",
            expected="one extraction at a time into a store",
            fix="wait for it, or stop it and run this line again; if it was killed, its lock ends "
            f"in {left:.0f} s",
        )


def _expired(text: bytes, held: ObjectInfo) -> bool:
    return held.age >= _read(text).get("seconds", 0.0)


def _read(text: bytes) -> dict[str, Any]:
    try:
        told = json.loads(text)
    except ValueError:
        told = None
    return told if isinstance(told, dict) else {}


def _now() -> float:
    """Seconds that go on counting while the machine sleeps, where the system can say so."""
    clock = getattr(time, "CLOCK_BOOTTIME", None)
    return time.monotonic() if clock is None else time.clock_gettime(clock)
