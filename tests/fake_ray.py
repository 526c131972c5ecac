"""Ray's part in the pool, by threads of this process: a test of the pool starts no cluster."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import ray

from milan.errors import MilanError
from pipeline.cluster import pool
from pipeline.cluster.connect import RemoteClass


class Method:
    """What Ray makes of an actor's method."""

    def __init__(self, remote: Callable[..., Future[Any]]) -> None:
        self.remote = remote


class Actor:
    """A worker with so many threads; `die` is a crash."""

    def __init__(self, worker: Any, threads: int) -> None:
        self.worker, self.threads = worker, ThreadPoolExecutor(threads)
        self.tasks: list[Future[Any]] = []
        self.dead = False
        self.call, self.read = Method(self._call), Method(self._read)

    def _call(self, method: str, *arguments: Any) -> Future[Any]:
        task: Future[Any] = Future()
        self.tasks.append(task)

        def work() -> None:
            try:
                self._end(task, ("result", getattr(self.worker, method)(*arguments)))
            except Died:
                self.die()
            except MilanError as error:
                self._end(task, ("error", pickle.dumps(error)))
            except Exception as error:
                self._end(task, ray.exceptions.RayTaskError("call", str(error), error))

        if self.dead:
            self.die()
        else:
            self.threads.submit(work)
        return task

    def _read(self, name: str) -> Future[Any]:
        if self.dead:
            raise ray.exceptions.RayActorError
        return self.threads.submit(getattr, self.worker, name)

    def _end(self, task: Future[Any], result: Any) -> None:
        if not task.done():
            failed = isinstance(result, Exception)
            (task.set_exception if failed else task.set_result)(result)

    def die(self) -> None:
        """All its tasks end so, those that wait as well."""
        self.dead = True
        for task in self.tasks:
            self._end(task, ray.exceptions.RayActorError())
        self.threads.shutdown(wait=False, cancel_futures=True)


class Died(BaseException):
    """A worker raises it in place of crashing."""


class FakeRay:
    """The functions of Ray that the pool calls."""

    exceptions = ray.exceptions

    def __init__(self) -> None:
        self.actors: list[Actor] = []

    def wait(self, tasks: list[Any], timeout: float) -> tuple[list[Any], list[Any]]:
        """One that has ended, the others."""
        done = [t for t in tasks if t in wait_for(tasks, timeout, FIRST_COMPLETED).done][:1]
        return done, [t for t in tasks if t not in done]

    def get(self, task: Any, timeout: float | None = None) -> Any:
        """Its result."""
        try:
            return task.result(timeout)
        except TimeoutError:
            raise ray.exceptions.GetTimeoutError from None
        except CancelledError:
            raise ray.exceptions.RayActorError from None

    def kill(self, actor: Actor) -> None:
        """End an actor."""
        actor.die()


@contextmanager
def fake_ray(start: Callable[..., Any] | None = None) -> Iterator[FakeRay]:
    """Inside, the pool's workers are threads here: `start()`, else those that it names."""
    fake = FakeRay()

    def starter(self: RemoteClass, *, max_concurrency: int, **_: Any) -> Callable[[], Actor]:
        def build() -> Actor:
            from importlib import import_module

            make = start or getattr(import_module(self.module), self.name)
            fake.actors.append(Actor(make(**self.arguments), max_concurrency))
            return fake.actors[-1]

        return build

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pool, "ray", fake)
        patch.setattr(pool, "connected", lambda _: nullcontext())
        patch.setattr(RemoteClass, "starter", starter)
        yield fake
