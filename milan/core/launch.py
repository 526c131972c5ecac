"""Ranks on this machine: started together, restarted together, told of signals together."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections import deque
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any

import torch

from milan.core.progress import ForwardedProgress, NoProgress, Progress, replay
from milan.core.signals import (
    Stop,
    blocked_stop_signals,
    exit_with_parent,
    on_stop_signals,
    unblock_stop_signals,
)
from milan.errors import MilanError, TrainError

_GRACE = 5.0  # seconds in which ranks may say what they died of


def launch(
    work: Callable[..., Any],
    arguments: dict[str, Any],
    *,
    ranks: int,
    restarts: int,
    again: Callable[[], dict[str, Any]],
    progress: Progress,
) -> Any:
    """Call `work(**arguments, stop=…, watch=…)` in `ranks` processes; returns what rank 0's does.

    Each finds in its environment who it is (milan.core.distributed). If one dies, all are started
    again, at
    most `restarts` times and with the arguments `again()`: they go on from the last checkpoint. A
    MilanError of one is raised here, and so is, as TrainError, one death too many. `work` and its
    arguments are pickled.
    """

    stop = Stop()

    def live(given: dict[str, Any]) -> tuple[str | None, Any]:
        with tempfile.TemporaryDirectory(prefix="milan-ranks-") as folder:
            died = _once(work, given, ranks, Path(folder), stop, progress)
            errors = [_read(path) for path in sorted(Path(folder).glob("error.*"))]
            if errors:
                raise errors[0]
            if died and "exit code" in died:  # and nobody has explained it
                for path in sorted(Path(folder).glob("traceback.*")):
                    progress.note(f"rank {path.suffix[1:]}: {path.read_text()}")
            return died, None if died else _read(Path(folder) / "result")

    return persistently(
        live, arguments, again=again, restarts=restarts, ranks=ranks, stop=stop, progress=progress
    )


def persistently(
    live: Callable[[dict[str, Any]], tuple[str | None, Any]],
    arguments: dict[str, Any],
    *,
    again: Callable[[], dict[str, Any]],
    restarts: int,
    ranks: int,
    stop: Stop,
    progress: Progress,
) -> Any:
    """What `live(arguments)`, a life of all ranks, results in: (how one died or None, a result).

    After a death they live again, with the arguments `again()`, at most `restarts` times, and not
    if they were asked to `stop`. Raises TrainError for one death too many.
    """
    died, result = live(arguments)
    for attempt in range(1, restarts + 1):
        if died is None or stop.by:
            break
        progress.note(
            f"{died}; all start again from the last checkpoint ({attempt} of {restarts} times)"
        )
        died, result = live(arguments | again())
    if died is None:
        return result
    raise TrainError(
        f"{died}, " + (f"asked to stop by {stop.by}" if stop.by else f"after {restarts} restarts"),
        expected=f"{ranks} ranks that live",
        fix="the same line goes on from the last checkpoint",
    )


def _once(
    work: Callable[..., Any],
    arguments: dict[str, Any],
    ranks: int,
    folder: Path,
    stop: Stop,
    progress: Progress,
) -> str | None:
    """One life of all ranks; how the first of them died, or None."""
    context, port = multiprocessing.get_context("spawn"), _free_port()
    heard, speaks = context.Pipe(duplex=False)
    processes = [
        context.Process(
            target=_rank,
            args=(rank, ranks, port, folder, work, arguments, speaks if rank == 0 else None),
        )
        for rank in range(ranks)
    ]

    def ask(number: int) -> None:
        _pass_on(processes, number)
        stop.request(number)

    with on_stop_signals(ask):
        with blocked_stop_signals():  # until a rank can finish a step when it is told to stop
            for process in processes:
                process.start()
        speaks.close()
        alive: dict[Any, int] = {p.sentinel: rank for rank, p in enumerate(processes)}
        died, listening = None, [heard]
        while alive and died is None:
            for ready in multiprocessing.connection.wait([*alive, *listening]):
                if ready is not heard:
                    rank = alive.pop(ready)
                    died = died or _end_of(processes[rank], rank)
                elif not _hear(heard, progress):
                    listening = []
        while listening and heard.poll() and _hear(heard, progress):
            pass  # what rank 0 said last
        until = time.monotonic() + _GRACE
        for process in processes:
            if died is not None:
                process.join(max(0.0, until - time.monotonic()))
                process.kill()
            process.join()
    return died


def _hear(heard: Any, progress: Progress) -> bool:
    """Pass one thing on that rank 0 said; False if it has ended."""
    try:
        replay(progress, heard.recv())
    except EOFError:
        return False
    return True


def _end_of(process: Any, rank: int) -> str | None:
    """How a process died, None if it ended well."""
    process.join()
    code = process.exitcode or 0
    name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    return f"rank {rank} died ({name})" if code else None


def _pass_on(processes: list, number: int) -> None:
    for process in processes:
        if process.pid and process.is_alive():
            os.kill(process.pid, number)


def _rank(
    rank: int,
    ranks: int,
    port: int,
    folder: Path,
    work: Callable[..., Any],
    arguments: dict[str, Any],
    speaks: Any,
) -> None:
    """A rank's process; `speaks` is where rank 0's watcher is heard."""
    Thread(target=exit_with_parent, daemon=True).start()
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    if not torch.cuda.is_available():
        torch.set_num_threads(max(1, torch.get_num_threads() // ranks))
    stop = Stop()
    with on_stop_signals(stop.request):
        unblock_stop_signals()
        try:
            progress = ForwardedProgress(speaks.send) if speaks else NoProgress()
            result = work(**arguments, stop=stop, progress=progress)
        except MilanError as error:
            _write(folder / f"error.{rank}", error)
            sys.exit(1)
        except KeyboardInterrupt:
            sys.exit(130)
        except Exception:  # when one rank has failed, the others do too, each in its own way
            (folder / f"traceback.{rank}").write_text(traceback.format_exc())
            sys.exit(1)
    if rank == 0:
        _write(folder / "result", result)


class Rank:
    """A rank in a process that another machine asked for; see pipeline.cluster.pool.run_ranks."""

    def __init__(self, **arguments: Any) -> None:
        self.arguments, self.stop = arguments, Stop()
        self.said: deque[tuple[str, tuple, dict]] = deque()

    def port(self) -> int:
        """Where ranks can meet on this machine."""
        return _free_port("")

    def run(self, environment: dict[str, str]) -> Any:
        """Pretrain as one of the ranks that `environment` tells of."""
        from milan.training.pretrain import pretrain

        os.environ |= environment
        return pretrain(
            **self.arguments, stop=self.stop, progress=ForwardedProgress(self.said.append)
        )

    def hear(self) -> list[tuple[str, tuple, dict]]:
        """What the watcher was told since the last call."""
        return [self.said.popleft() for _ in range(len(self.said))]

    def ask(self, number: int) -> None:
        """Pass a signal on."""
        self.stop.request(number)


def _free_port(host: str = "127.0.0.1") -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]


def _write(path: Path, value: Any) -> None:
    part = path.with_name(f".{path.name}")
    part.write_bytes(pickle.dumps(value))
    os.replace(part, path)


def _read(path: Path) -> Any:
    return pickle.loads(path.read_bytes())  # of our own process, in a folder that only we can read
