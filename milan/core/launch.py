"""Ranks on this machine: processes that are started, restarted and asked to stop together."""

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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Any

import torch

from milan.core.distributed import Ranks, process_group
from milan.core.progress import ForwardedProgress, NoProgress, Progress, replay
from milan.core.signals import (
    Stop,
    blocked_stop_signals,
    exit_with_parent,
    how_it_ended,
    keep_sockets_short,
    on_stop_signals,
    unblock_stop_signals,
    without_main_module,
)
from milan.core.waiting import Stopped
from milan.core.watchdog import watched
from milan.errors import MilanError, RankError, TrainError

_PERIOD = 30.0  # seconds between two looks at ranks that say nothing
_GRACE = 5.0  # seconds in which the other ranks may report why one crashed


@contextmanager
def as_rank(
    ranks: Ranks | None, device: torch.device, *, stop: Stop, progress: Progress
) -> Iterator[tuple[Ranks, torch.device]]:
    """Inside, this process is one of `ranks`, or alone: yields its ranks and its own device.

    A signal requests `stop`, and a watchdog ends the process where it stands still. Raises as
    process_group does.
    """
    with (
        on_stop_signals(stop.request),
        watched(stop, rank=ranks.rank if ranks else None),
        process_group(ranks, device, stop=stop, progress=progress) as rank_and_device,
    ):
        yield rank_and_device


def launch(
    work: Callable[..., Any],
    arguments: dict[str, Any],
    *,
    ranks: int,
    restarts: int,
    restart_arguments: Callable[[], dict[str, Any]],
    progress: Progress,
) -> Any:
    """Call `work(**arguments, stop=…, progress=…)` in `ranks` processes; returns rank 0's result.

    Each process finds its rank in its environment (milan.core.distributed). If one crashes, all are
    restarted, see `run_with_restarts`. A MilanError of a rank is raised here. `work`, its arguments
    and its result are pickled.
    """
    stop = Stop()

    def attempt(arguments: dict[str, Any]) -> tuple[str | None, Any]:
        with tempfile.TemporaryDirectory(prefix="milan-ranks-") as name:
            folder = Path(name)
            crash = _run_processes(work, arguments, ranks, folder, stop, progress)
            errors = [_read(path) for path in sorted(folder.glob("error.*"))]
            if errors:
                raise errors[0]
            if crash and "exit code" in crash:  # and no error explains it
                for path in sorted(folder.glob("traceback.*")):
                    progress.note(f"rank {path.suffix[1:]}: {path.read_text(encoding='utf-8')}")
            return crash, None if crash else _read(folder / "result")

    return run_with_restarts(
        attempt, arguments, restart_arguments=restart_arguments, restarts=restarts, ranks=ranks,
        stop=stop, progress=progress,
    )  # fmt: skip


def run_with_restarts(
    attempt: Callable[[dict[str, Any]], tuple[str | None, Any]],
    arguments: dict[str, Any],
    *,
    restart_arguments: Callable[[], dict[str, Any]],
    restarts: int,
    ranks: int,
    stop: Stop,
    progress: Progress,
) -> Any:
    """The result of `attempt(arguments) -> (how a rank crashed or None, result)`.

    After a crash all ranks are restarted with `restart_arguments()` added, at most `restarts`
    times, and not if they were asked to `stop`: they go on from the last checkpoint. Used for
    processes on this machine and for actors on a cluster. Raises TrainError for one crash too many,
    and Stopped for one after a signal.
    """
    crash, result = attempt(arguments)
    for restart in range(1, restarts + 1):
        if crash is None or stop.by:
            break
        progress.note(
            f"{crash}; all ranks restart from the last checkpoint (restart {restart} of {restarts})"
        )
        crash, result = attempt(arguments | restart_arguments())
    if crash is None:
        return result
    if stop.by:  # one that stood still could not stop otherwise; the last checkpoint stays
        progress.note(f"{crash}, asked to stop by {stop.by}")
        raise Stopped(stop.by)
    raise TrainError(
        f"{crash}, after {restarts} restarts",
        expected=f"{ranks} ranks that run to the end",
        fix="the same line goes on from the last checkpoint",
    )


def _run_processes(
    work: Callable[..., Any],
    arguments: dict[str, Any],
    ranks: int,
    folder: Path,
    stop: Stop,
    progress: Progress,
) -> str | None:
    """One attempt of all ranks; how the first that crashed did, or None."""
    keep_sockets_short()
    context, port = multiprocessing.get_context("spawn"), free_port("127.0.0.1")
    receiver, sender = context.Pipe(duplex=False)
    processes = [
        context.Process(
            target=_run_rank,
            args=(rank, ranks, port, folder, work, arguments, sender if rank == 0 else None),
        )
        for rank in range(ranks)
    ]

    def request_stop(number: int) -> None:
        for process in processes:
            if process.pid and process.is_alive():
                os.kill(process.pid, number)
        stop.request(number)

    with on_stop_signals(request_stop):
        with (
            blocked_stop_signals(),
            without_main_module(),
        ):  # until a rank can finish its step when it is asked to stop
            for process in processes:
                process.start()
        sender.close()
        alive: dict[Any, int] = {p.sentinel: rank for rank, p in enumerate(processes)}
        crash, open_pipes = None, [receiver]
        try:
            while alive and crash is None:
                news = multiprocessing.connection.wait([*alive, *open_pipes], _PERIOD)
                if stop.by and not news:  # a rank that was starting may not have heard it
                    for rank in alive.values():
                        os.kill(processes[rank].pid or 0, signal.SIGTERM)
                for ready in news:
                    if ready is not receiver:
                        rank = alive.pop(ready)
                        crash = crash or _crash_of(processes[rank], rank)
                    elif not _replay_next(receiver, progress):
                        open_pipes = []
        except BaseException:  # a second Ctrl-C: this process would wait for ranks that hang
            for process in processes:
                process.kill()
            raise
        while open_pipes and receiver.poll() and _replay_next(receiver, progress):
            pass  # rank 0's last progress
        deadline = time.monotonic() + _GRACE
        for process in processes:
            if crash is not None:
                process.join(max(0.0, deadline - time.monotonic()))
                process.kill()
            process.join()
    return crash


def _replay_next(receiver: Any, progress: Progress) -> bool:
    """Pass on one call of rank 0's progress; False if rank 0 has closed its end."""
    try:
        replay(progress, receiver.recv())
    except EOFError:
        return False
    return True


def _crash_of(process: Any, rank: int) -> str | None:
    """How a process crashed, None if it ended well."""
    process.join()
    how, cause = how_it_ended(process.exitcode)
    return f"rank {rank} crashed ({how}; likely cause: {cause})" if process.exitcode else None


def _run_rank(
    rank: int,
    ranks: int,
    port: int,
    folder: Path,
    work: Callable[..., Any],
    arguments: dict[str, Any],
    sender: Any,
) -> None:
    """A rank's process; `sender` is where rank 0 sends its progress, None for the others."""
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
            progress = ForwardedProgress(sender.send) if sender else NoProgress()
            result = work(**arguments, stop=stop, progress=progress)
        except MilanError as error:
            _write(folder / f"error.{rank}", error)
            sys.exit(1)
        except KeyboardInterrupt:
            sys.exit(130)
        except RankError:  # another rank is the cause
            sys.exit(1)
        except Exception:  # when one rank has failed, the others fail too, each in its own way
            (folder / f"traceback.{rank}").write_text(traceback.format_exc(), encoding="utf-8")
            sys.exit(1)
    if rank == 0:
        _write(folder / "result", result)


def free_port(host: str = "") -> int:
    """A TCP port that nobody listens on, at `host`; by default at any address of this machine."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]


def _write(path: Path, value: Any) -> None:
    part = path.with_name(f".{path.name}")
    part.write_bytes(pickle.dumps(value))
    os.replace(part, path)


def _read(path: Path) -> Any:
    return pickle.loads(path.read_bytes())  # of our own process, in a folder that only we can read
