"""The lock of a store in a bucket: a lease, that is an object which its owner renews by PUTs.

It names its owner and for how many seconds it is valid after a PUT. Only the server's clock decides
whether it has expired; an expired one is replaced on condition that it is still the same object.
The owner counts by its own clock from before each request, so that it gives up first.
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
"""How long a lock is valid without renewal: so long a killed driver blocks its store."""
_RENEWALS = 4  # in that time
# The owner stops trusting it so many seconds before its end: the server counts whole seconds, and
# clocks drift.
_MARGIN = 2.0


class Lease:
    """A lock that a thread of this process renews until `close`, or until it is lost."""

    def __init__(self, store: Url, run: str) -> None:
        """Take the lock. Raises CacheError, naming the owner, if another process has it."""
        self.store, self.where, self.run = store, store / ".lock", run
        self.seconds, self.renewals = SECONDS, 0
        self.until, self.lost = 0.0, ""
        self.etag = self._take()
        check_conditions(store, self.where, self._text() + b" ")
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
        """Release it: any process may take it at once."""
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
        began, current = _now(), get(self.where)
        if current and not _expired(*current):
            raise self._in_use(*current)
        etag = put(self.where, self._text(), over=current[1].etag if current else None)
        if etag is None:  # another process was faster
            raise self._in_use(*(get(self.where) or (b"", None)))
        self.until = began + self.seconds - _MARGIN
        return etag

    def _renew(self) -> None:
        answered, began = True, 0.0
        while not self._ended.wait(self.seconds / _RENEWALS) and self._ours():
            # After a lost answer the same content is sent again, and counts from the first time:
            # that request may have arrived.
            if answered:
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
        lock = {"owner": owner, "run": self.run, "seconds": self.seconds, "renewed": self.renewals}
        return json.dumps(lock).encode()

    def _holder(self) -> str:
        try:
            current = get(self.where)
        except MilanError:
            current = None
        return _parse(current[0]).get("owner", "nobody") if current else "nobody"

    def _in_use(self, text: bytes, info: ObjectInfo | None) -> CacheError:
        lock = _parse(text)
        seconds = max(0.0, lock.get("seconds", 0.0) - info.age) if info else 0.0
        return CacheError(
            f"{self.store} is in use by {lock.get('owner', 'another process')}",
            expected="one extraction at a time into a store",
            fix="wait for it, or stop it and run this line again; if it was killed, its lock ends "
            f"in {seconds:.0f} s",
        )


def check_conditions(store: Url, where: Url, other: bytes) -> None:
    """Put `other` over the object at `where`, which must fail.

    Raises CacheError if the server ignores conditions of a PUT: no lock is safe then.
    """
    if put(where, other, over=None) or put(where, other, over='"none"'):
        raise CacheError(
            f"the server of {store} ignores the conditions of a PUT",
            expected="S3 with If-None-Match and If-Match",
            fix="another server or a newer one; pip install --upgrade s3fs botocore",
        )


def _expired(text: bytes, info: ObjectInfo) -> bool:
    return info.age >= _parse(text).get("seconds", 0.0)


def _parse(text: bytes) -> dict[str, Any]:
    """What a lock says; one that is damaged is no lock, and has expired."""
    try:
        lock = json.loads(text)
    except ValueError:
        lock = None
    whole = isinstance(lock, dict) and isinstance(lock.get("seconds"), int | float)
    return lock if whole else {}


def _now() -> float:
    """A clock in seconds that counts while the machine sleeps, where the system has one."""
    clock = getattr(time, "CLOCK_BOOTTIME", None)
    return time.monotonic() if clock is None else time.clock_gettime(clock)
