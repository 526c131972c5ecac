"""Several ranks: the same run as one, restarted when one dies, stopped together."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    SMALL,
    Forked,
    Notes,
    log_of,
    pretrain_line,
    run_here,
    tree,
    wait_for_step,
    weights,
)
from safetensors.torch import load_file
from torch.distributed import HashStore

import milan
from milan.core.device import ranks_here
from milan.core.distributed import Ranks, first_host, parallelise, sync_gradients
from milan.core.progress import NoProgress
from milan.core.signals import Stop
from milan.data.loader import training_loader
from milan.data.order import Order, order_of
from milan.data.sampler import Address, Kind, StepSampler, split_over_ranks
from milan.errors import ConfigError, MilanError, TrainError
from milan.models.masking import importance_mask
from milan.reporting.run_files import write_run
from milan.training import run as run_module

TWO: dict[str, Any] = {**SMALL, "devices": 2, "num_workers": 0, "log_every": 1}
JOIN = """
import sys, torch
from milan.core.distributed import Ranks, process_group
from milan.errors import ConfigError
with process_group(Ranks.from_environment(), torch.device("cpu")) as (ranks, device):
    assert ranks.any_flags(1 << ranks.rank) == 3
    assert ranks.all_reduce_sum([1.5, ranks.rank]) == [3.0, 1.0]
    rows = ranks.gather(torch.full((2, 1), ranks.rank))
    assert rows.flatten().tolist() == [0, 0, 1, 1]
    assert ranks.on_rank0(lambda: ranks.rank + 7) == 7
    def refuse():
        raise ConfigError("no")
    try:
        ranks.on_rank0(refuse)
    except ConfigError as error:
        print("refused", error, flush=True)
"""


def close(ours: Path, theirs: Path) -> None:
    """Losses of two runs agree to float tolerance, and so do the weights they end with."""
    a, b = ([line["loss"] for line in log_of(run)] for run in (ours, theirs))
    np.testing.assert_allclose(a, b, rtol=1e-5)
    one, two = (load_file(run / "encoder.safetensors") for run in (ours, theirs))
    apart = sum((one[name] - two[name]).square().sum() for name in one)
    assert (apart / sum(two[name].square().sum() for name in two)).sqrt() < 1e-3


@pytest.fixture(scope="module")
def alone(finished_run: Callable[..., Path]) -> Path:
    """An uninterrupted run on one rank, two micro-batches a step; not to be changed."""
    return finished_run(**TWO | {"devices": 1, "micro_batch": 4})


@pytest.mark.parametrize("parallel", ["ddp", pytest.param("fsdp", marks=pytest.mark.soak)])
def test_one_two_one(
    parallel: str, alone: Path, store: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Begun on one rank, continued on two, ended on one: rows, masks and losses are the same."""
    if parallel == "ddp":  # ranks of fsdp are started as a user's are
        request.getfixturevalue("forked_ranks")
    run = {**TWO, "out": str(tmp_path / "run"), "parallel": parallel, "micro_batch": 2}
    milan.pretrain(str(store), **run | {"devices": 1, "stop_after": 5})
    notes = Notes()
    figures = milan.pretrain(str(store), **run | {"stop_after": 9}, progress=notes)
    assert (figures["step"], figures["finished"]) == (14, False)
    assert "(2 x 2 x 2)" in notes.line("steps: ")
    assert notes.begun == [(21, 5)]
    milan.pretrain(str(store), **run | {"devices": 1})
    close(tmp_path / "run", alone)


def test_a_rank_that_dies(store: Path, alone: Path, tmp_path: Path) -> None:
    """All start again from the last checkpoint, and say so; the losses are those of a quiet run."""
    out = tmp_path / "run"
    process = Forked(pretrain_line(store, out, "--devices", 2), tmp_path / "output")
    wait_for_step(process, out, 6)
    ranks = process.ranks()
    assert len(ranks) == 2
    os.kill(ranks[-1], signal.SIGKILL)
    code, output = process.end()
    assert code == 0, output
    assert "all ranks restart from the last checkpoint (restart 1 of 3)" in output
    close(out, alone)


@pytest.mark.soak
def test_a_rank_that_dies_too_often(store: Path, tmp_path: Path) -> None:
    """After so many restarts the run ends with one line, and can go on."""
    out = tmp_path / "run"
    process = _start(pretrain_line(store, out, "--devices", 2, "--set", "max_restarts=0"))
    wait_for_step(process, out, 4)
    os.kill(_children(process.pid)[0], signal.SIGKILL)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "after 0 restarts" in said
    assert "goes on from the last checkpoint" in said


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_asked_to_stop(number: signal.Signals, store: Path, alone: Path, tmp_path: Path) -> None:
    """The step in hand is finished and saved; handlers are what they were; the run can go on."""

    class Impatient(Notes):
        def advance(self, done: int, figures: str = "") -> None:
            if done == 5:
                os.kill(os.getpid(), number)

    one = {**TWO, "devices": 1, "micro_batch": 4, "out": str(tmp_path)}
    before = signal.getsignal(number)
    figures = milan.pretrain(str(store), progress=Impatient(), **one)
    assert signal.getsignal(number) is before
    assert (figures["step"], figures["stopped_by"]) == (6, number.name)
    figures = milan.pretrain(str(store), **one)
    assert "stopped_by" not in figures
    assert weights(tmp_path) == weights(alone)


def test_ranks_asked_to_stop(store: Path, alone: Path, tmp_path: Path) -> None:
    """All finish the same step; code 75, so that a scheduler requeues; the same line goes on."""
    out = tmp_path / "run"
    # Small micro-batches: the signal must arrive before the last step.
    line = pretrain_line(store, out, "--set", "micro_batch=1", "--devices", 2)
    process = Forked(line, tmp_path / "output")
    wait_for_step(process, out, 5)
    process.send_signal(signal.SIGTERM)
    code, output = process.end()
    assert code == 75, output
    assert "the same line goes on" in output
    stopped = max(int(p.name[5:]) for p in (out / "checkpoints").iterdir())
    assert 5 <= stopped < 21
    assert log_of(out)[-1]["step"] == stopped
    done = run_here(*line[1:-1], 1)
    assert done.code == 0, done.err
    assert f"at step {stopped}" in done.out
    close(out, alone)


@pytest.mark.usefixtures("forked_ranks")
def test_an_error_of_a_rank_is_the_runs(store: Path, tmp_path: Path) -> None:
    """What a rank finds wrong is said once, by its own words, and nothing is restarted."""
    notes = Notes()
    bad = {**TWO, "out": str(tmp_path), "lr": 1e30, "objective": "pixels", "epochs": 20}
    with pytest.raises(TrainError, match="the loss of step"):
        milan.pretrain(str(store), progress=notes, **bad, warmup_epochs=0)
    assert not [line for line in notes.lines if "ranks restart" in line]


def test_what_does_not_fit_is_said_before(store: Path, tmp_path: Path) -> None:
    """Batches that the ranks cannot share, more ranks than images."""
    with pytest.raises(ConfigError, match="batch size 8 over 3 ranks") as error:
        milan.pretrain(str(store), **TWO | {"out": str(tmp_path), "devices": 3})
    assert "--batch-size 9" in error.value.fix
    with pytest.raises(MilanError, match="batch size 8 over 16 ranks"):
        milan.pretrain(str(store), **TWO | {"out": str(tmp_path), "devices": 16})
    assert not list(tmp_path.iterdir())


@pytest.mark.soak
def test_asked_to_stop_before_the_first_step(store: Path, tmp_path: Path) -> None:
    """While ranks are still starting: none of them is started again, and nothing is in the way of
    the same line."""
    out = tmp_path / "run"
    line = pretrain_line(store, out, "--devices", 2)
    process, until = _start(line), time.monotonic() + 60
    while len(_children(process.pid)) < 2:
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 75, said
    assert "stopped by SIGTERM" in said
    assert "ranks restart" not in said
    done = run_here(*line[1:-1], 1, "--max-steps", 1)
    assert done.code == 0, done.err


@pytest.mark.soak
def test_a_group_is_asked_to_stop(store: Path, alone: Path, tmp_path: Path) -> None:
    """Ctrl-C reaches loader workers too: they go on until the step in hand has its batches."""
    out = tmp_path / "run"
    more = ("--num-workers", 2, "--set", "micro_batch=1")
    process = _start(pretrain_line(store, out, *more), start_new_session=True)
    wait_for_step(process, out, 5)
    os.killpg(process.pid, signal.SIGINT)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 75, said
    assert "SIGINT: finishing the step, then a checkpoint" in said
    assert "stopped by SIGINT at step" in said
    milan.pretrain(str(store), **TWO | {"devices": 1, "micro_batch": 1, "out": str(out)})
    close(out, alone)


def test_ctrl_c_twice_does_not_wait() -> None:
    """One press may arrive twice at once, from the terminal and passed on."""
    stop = Stop()
    stop.request(signal.SIGINT)
    stop.request(signal.SIGINT)
    stop._at -= 5
    stop.request(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        stop.request(signal.SIGINT)
    assert stop.by == "SIGINT"


def test_one_training_at_a_time(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second call into the same folder is told who trains there, and changes nothing."""
    run = {**TWO, "devices": 1, "out": str(tmp_path), "stop_after": 2}
    milan.pretrain(str(store), **run)
    before = tree(tmp_path)
    monkeypatch.setattr(run_module, "_LOCK_SECONDS", 0.3)
    with (
        run_module.locked(tmp_path, progress=NoProgress()),
        pytest.raises(TrainError, match=f"in use by pid {os.getpid()}") as error,
    ):
        milan.pretrain(str(store), **run)
    assert "wait for it" in error.value.fix
    assert tree(tmp_path) == before
    assert milan.pretrain(str(store), **run)["step"] == 4


def test_what_ranks_are_told_when_they_live_again(tmp_path: Path) -> None:
    """To go on, once their run has begun; before, what they were told the first time."""
    again = run_module.restart_arguments(tmp_path)
    assert again() == {}
    parts = [{"epoch": 0, "generations": 1, "cache": "c"}]
    about = {"id": "a", "identity": {"cache": "c"}, "config": {}, "targets": {}}
    write_run(tmp_path, about | {"stretches": parts})
    assert again() == {"resume": "auto", "overwrite": False}
    assert run_module.restart_arguments(tmp_path)() == {}


def test_gradients_are_summed_once_a_step() -> None:
    """Of four micro-batches the last one alone speaks to the other ranks."""
    torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        sums = 0

        def count(_, bucket):  # type: ignore[no-untyped-def]  # torch reads annotations
            nonlocal sums
            sums += 1
            done: Any = torch.futures.Future()
            done.set_result(bucket.buffer())
            return done

        network = parallelise(torch.nn.Linear(3, 2), Ranks(size=2), "ddp")
        network.register_comm_hook(None, count)  # type: ignore[operator]
        for micro in range(4):
            with sync_gradients(network, micro == 3):
                network(torch.ones(5, 3)).sum().backward()
        assert sums == 1
        assert network.module.bias.grad.tolist() == [20, 20]  # type: ignore[union-attr]
    finally:
        torch.distributed.destroy_process_group()


def test_every_visible_gpu_has_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """--devices restricts it; one that is named is one."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    gpu = torch.device("cuda")
    assert ranks_here("auto", gpu, None) == 4
    assert ranks_here("auto", gpu, 2) == 2
    assert ranks_here("cuda:1", torch.device("cuda", 1), None) == 1
    assert ranks_here("auto", torch.device("cpu"), None) == 1
    with pytest.raises(ConfigError, match="devices 8") as error:
        ranks_here("auto", gpu, 8)
    assert "at most the 4 GPUs" in error.value.expected


@pytest.mark.parametrize(("gpus", "local"), [(1, 0), (4, 3)])
def test_the_gpu_of_a_task_of_slurms(
    gpus: int, local: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each task may see its own alone (--gpus-per-task), or all of the machine."""
    told = {"STEP_NUM_TASKS": 8, "PROCID": 7, "LOCALID": 3, "STEP_NODELIST": "a", "JOB_ID": 1}
    for name, value in told.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    monkeypatch.delenv("RANK", raising=False)
    for name in ("MASTER_ADDR", "MASTER_PORT"):  # would be set for good
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert Ranks.from_environment() == Ranks(7, 8, local)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_masks_do_not_depend_on_ranks(ranks: int, store: Path) -> None:
    """Each view of a step is hidden in the same places, whoever is given it."""

    def hidden(size: int) -> dict[tuple[int, int], list[int]]:
        dataset, found = milan.open_cache(store), {}
        order = order_of(dataset.cache, seed=3, batch_size=8)
        for rank in range(size):
            sampler = StepSampler(order, start=2, stop=5, micro=8 // size, rank=rank, ranks=size)
            for batch in training_loader(dataset, sampler, features=False, num_workers=0):
                mask = importance_mask(batch.attention, batch.noise, visible=4)
                at = zip(batch.rows.tolist(), batch.views.tolist(), strict=True)
                found |= dict(zip(at, mask.masked.tolist(), strict=True))
        return found

    assert len(hidden(1)) == 24
    assert hidden(ranks) == hidden(1)


@pytest.mark.soak
def test_torchrun(store: Path, alone: Path, tmp_path: Path) -> None:
    """Under torchrun the command is one rank of those that it started."""
    out = tmp_path / "run"
    torchrun = Path(sys.executable).parent / "torchrun"
    command = [str(torchrun), "--standalone", "--nproc-per-node=2", "--no-python"]
    done = subprocess.run(
        [*command, *pretrain_line(store, out)],
        capture_output=True,
        text=True,
        timeout=180,
        env=_env(),
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("steps: 21 of 8 images (2 x ") == 1
    close(out, alone)


def test_speaking_as_slurm_has_it() -> None:
    """Two processes with srun's variables find each other and agree."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", JOIN],
            env=_env()
            | {
                "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank),
                "SLURM_STEP_NODELIST": "localhost", "SLURM_JOB_ID": str(os.getpid()),
            },
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    for process in processes:
        out, err = process.communicate(timeout=120)
        assert (process.returncode, out.strip()) == (0, "refused no"), err


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu07", "gpu07"),
        ("gpu[07-09,12]", "gpu07"),
        ("a1,a2", "a1"),
        ("n[3,5],m1", "n3"),
        ("rack[1-2]n[3-4]", "rack1n3"),
        ("node[01-02]-ib,x", "node01-ib"),
    ],
)
def test_the_first_of_slurms_nodes(nodes: str, first: str) -> None:
    """Lists as scontrol writes them."""
    assert first_host(nodes) == first


def test_no_variables_are_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone, and inside an sbatch script before srun."""
    for name in ("RANK", "WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_NTASKS", "8")
    assert Ranks.from_environment() is None
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert Ranks.from_environment() == Ranks(3, 8, 1)


@pytest.mark.parametrize("ranks", [1, 2, 4, 3, 64])
def test_what_comes_after_an_epoch(ranks: int) -> None:
    """As many batches for each rank, none empty, and all rows of them together once."""
    batch, micro = {3: (6, 2), 64: (64, 1)}.get(ranks, (8, 2))
    order = Order(
        np.arange(64),
        np.zeros(64, np.int64),
        64,
        1,
        0,
        batch,
        64,
        validation_rows=np.arange(64, 104),
    )
    held = order.validation_rows
    whole = Address(Kind.VALIDATION, 0, held, np.zeros_like(held))
    seen, asides = [], set()
    for rank in range(ranks):
        mine = split_over_ranks(whole, rank=rank, ranks=ranks, micro=micro)
        sampler = StepSampler(
            order, start=0, stop=2 * order.steps, micro=micro, rank=rank, ranks=ranks,
            after_epoch=lambda epoch, mine=mine: mine,
        )  # fmt: skip
        batches, aside = list(sampler), len(mine)
        each = order.steps * batch // ranks // micro
        assert len(batches) == len(sampler) == 2 * (each + aside)
        assert all(len(batch.rows) for batch in batches)
        kinds = [batch.kind for batch in batches]
        assert kinds[each : each + aside] == [Kind.VALIDATION] * aside
        asides.add(aside)
        for part in mine:
            seen += [] if part.padding else part.rows.tolist()
    assert len(asides) == 1
    assert sorted(seen) == held.tolist()


def _env() -> dict[str, str]:
    left = {k: v for k, v in os.environ.items() if not k.startswith(("RANK", "WORLD", "LOCAL_"))}
    return left | {"OMP_NUM_THREADS": "1"}


def _start(line: list[str], **options: Any) -> subprocess.Popen:
    return subprocess.Popen(
        line, env=_env(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
    )


def _children(pid: int) -> list[int]:
    """The ranks among the children of a process: its resource tracker is none."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [c for c in map(int, found) if b"spawn_main" in Path(f"/proc/{c}/cmdline").read_bytes()]
