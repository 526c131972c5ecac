"""The variables by which a launcher tells a process its rank, and how ranks meet."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from threading import Timer
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import Notes

from milan.core import distributed, waiting
from milan.core.distributed import Ranks, process_group
from milan.core.launch import free_port
from milan.core.signals import Stop, on_stop_signals
from milan.core.waiting import Stopped
from milan.errors import ConfigError, RankError, TrainError

CPU = torch.device("cpu")
SLURM = {
    "SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "7", "SLURM_LOCALID": "3",
    "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_JOB_ID": "5",
}  # fmt: skip
TORCH = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Without the variables of any launcher, before and after."""
    for name in list(os.environ):
        if name.startswith("SLURM_") or name in (*TORCH, "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
            monkeypatch.delenv(name)
    before = dict(os.environ)
    yield monkeypatch
    for name in set(os.environ) - set(before):
        del os.environ[name]


def tell(variables: dict[str, str], **changes: str | None) -> None:
    """Set the variables with changes; None leaves one out."""
    for name, value in (variables | changes).items():
        if value is not None:
            os.environ[name] = value


def join(**given: Any) -> None:
    """Become the rank that the variables say, and leave again."""
    with process_group(Ranks.from_environment(), CPU, **given):
        pass


@pytest.mark.parametrize(
    ("variables", "changes", "named"),
    [
        (TORCH, {"RANK": None}, "RANK is not set, but WORLD_SIZE=2; expected: a number from 0"),
        (TORCH, {"WORLD_SIZE": None}, "WORLD_SIZE is not set, but RANK=1"),
        (TORCH, {"RANK": ""}, "RANK is empty"),
        (TORCH, {"RANK": "2"}, "RANK=2; expected: a number from 0 to 1"),
        (TORCH, {"RANK": "-1"}, "RANK=-1"),
        (TORCH, {"RANK": "0x1"}, "RANK=0x1"),
        (TORCH, {"WORLD_SIZE": "0"}, "WORLD_SIZE=0; expected: a number from 1"),
        (TORCH, {"WORLD_SIZE": "two"}, "WORLD_SIZE=two"),
        (TORCH, {"LOCAL_RANK": "x"}, "LOCAL_RANK=x"),
        (TORCH, {"LOCAL_RANK": "2"}, "LOCAL_RANK=2"),
        (TORCH, {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "1"}, "LOCAL_RANK=1; expected: 0"),
        (TORCH, {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "3"}, "LOCAL_WORLD_SIZE=3"),
        (TORCH, {"MASTER_ADDR": None}, "MASTER_ADDR is not set, but RANK=1 and WORLD_SIZE=2"),
        (TORCH, {"MASTER_ADDR": " "}, "MASTER_ADDR is empty"),
        (TORCH, {"MASTER_ADDR": "no.such.host.invalid"}, "MASTER_ADDR=no.such.host.invalid is the"),
        (TORCH, {"MASTER_ADDR": "a" * 70 + ".b"}, "MASTER_ADDR=aaa"),
        (TORCH, {"MASTER_PORT": None}, "MASTER_PORT is not set"),
        (TORCH, {"MASTER_PORT": "65536"}, "MASTER_PORT=65536; expected: a number from 1 to 65535"),
        (TORCH, {"MASTER_PORT": "http"}, "MASTER_PORT=http"),
        (SLURM, {"SLURM_STEP_NUM_TASKS": ""}, "SLURM_STEP_NUM_TASKS is empty"),
        (SLURM, {"SLURM_STEP_NUM_TASKS": "8(x2)"}, r"SLURM_STEP_NUM_TASKS=8\(x2\)"),
        (SLURM, {"SLURM_PROCID": None}, "SLURM_PROCID is not set, but SLURM_STEP_NUM_TASKS=8"),
        (SLURM, {"SLURM_PROCID": "8"}, "SLURM_PROCID=8"),
        (SLURM, {"SLURM_LOCALID": None}, "SLURM_LOCALID is not set"),
        (SLURM, {"SLURM_JOB_ID": "a"}, "SLURM_JOB_ID=a"),
        (SLURM, {"SLURM_STEP_ID": "batch"}, "SLURM_STEP_ID=batch"),
        (SLURM, {"SLURM_STEP_NODELIST": None}, "SLURM_STEP_NODELIST is not set"),
        (SLURM, {"SLURM_STEP_NODELIST": ","}, "SLURM_STEP_NODELIST=,"),
    ],
)  # fmt: skip
def test_impossible_variables_are_named(
    variables: dict[str, str], changes: dict[str, str | None], named: str
) -> None:
    """Each in one line, with the variable and how to be rid of it."""
    tell(variables, **changes)
    with pytest.raises(ConfigError, match=named) as error:
        join()
    assert "unset " + ("SLURM_STEP_NUM_TASKS" if variables is SLURM else "RANK") in error.value.fix


def test_variables_that_say_nothing(clean: pytest.MonkeyPatch) -> None:
    """What other tools leave in a shell does no harm; one rank of one needs no server."""
    tell({"MASTER_ADDR": "far.away", "MASTER_PORT": "x", "LOCAL_RANK": "7", "SLURM_PROCID": "3"})
    assert Ranks.from_environment() is None
    tell({"SLURM_STEP_NUM_TASKS": "1"})
    assert Ranks.from_environment() is None
    tell({"RANK": "0", "WORLD_SIZE": "1"})
    del os.environ["LOCAL_RANK"]
    with process_group(Ranks.from_environment(), CPU) as (ranks, _):
        assert ranks.size == 1
    tell({"RANK": "1", "WORLD_SIZE": "2"})
    clean.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match="LOCAL_RANK is not set"):  # both would take one GPU
        Ranks.from_environment()


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_rank_that_is_alone(rank: int, number: signal.Signals, clean: pytest.MonkeyPatch) -> None:
    """Variables left in a shell: it says what it waits for, ends at a signal, and at a limit."""
    tell(TORCH, RANK=str(rank), MASTER_PORT=str(free_port("127.0.0.1")))
    clean.setattr(waiting, "_FIRST_WORD", 0.1)
    stop, notes = Stop(), Notes()
    Timer(0.8, os.kill, (os.getpid(), number)).start()
    with on_stop_signals(stop.request), pytest.raises(Stopped, match=number.name):
        join(stop=stop, progress=notes)
    assert f"(RANK={rank} and WORLD_SIZE=2)" in notes.lines[0]
    assert "unset RANK WORLD_SIZE" in notes.lines[0]
    clean.setattr(distributed, "_MEETING", 0.3)
    os.environ["MASTER_PORT"] = str(free_port("127.0.0.1"))
    with pytest.raises(TrainError, match="in vain for") as error:
        join()
    assert "unset RANK WORLD_SIZE" in error.value.fix


def test_a_port_that_is_taken(clean: pytest.MonkeyPatch) -> None:
    """By another program: rank 0 cannot serve there, and another rank does not wait for ever."""
    clean.setattr(distributed, "_MEETING", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as other:
        tell(TORCH, RANK="0", MASTER_PORT=str(other.getsockname()[1]))
        with pytest.raises(RankError, match="rank 0 cannot serve MASTER_ADDR="):
            join()
        os.environ["RANK"] = "1"
        with pytest.raises(TrainError, match="in vain for all 2 ranks"):
            join()


def test_two_processes_with_one_number() -> None:
    """The second one is refused: both would train on the same images."""
    server = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    dist.PrefixStore("milan/0", server).add("rank 1", 1)
    tell(TORCH, MASTER_PORT=str(server.port))
    with pytest.raises(ConfigError, match="two processes are rank 1"):
        join()
