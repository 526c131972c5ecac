"""Tests of pipeline/cluster with real Ray: the same bytes, whatever is killed."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
from helpers import (
    SMALL,
    STORE,
    Command,
    Notes,
    extract_here,
    log_of,
    make_photos,
    tagged,
    tree,
    until,
)
from safetensors.torch import load_file, save_file

from milan.errors import CacheError, MilanError
from pipeline.extract import extract_targets

pytestmark = pytest.mark.skipif(not Path("/proc").exists(), reason="reads processes from /proc")


# --- processes ------------------------------------------------------------------------------------


@pytest.fixture
def start(teacher_files: dict[str, str]) -> Iterator[Callable[..., Command]]:
    """start(data, cwd, *flags) -> a running command; nothing of it outlives the test."""
    begun: list[Command] = []

    def run(data: Path, cwd: Path, *more: object) -> Command:
        cwd.mkdir(exist_ok=True)
        begun.append(Command(data, cwd, teacher_files, *more))
        return begun[-1]

    yield run
    for command in begun:
        command.kill()


def hostile_folder(path: Path) -> Path:
    """A user's project that has packages of our names, which must never be imported."""
    for name in ("pipeline", "stages", "milan"):
        (path / name).mkdir(parents=True)
        text = f"raise SystemError('the user's own {name} was imported')\n"
        (path / name / "__init__.py").write_text(text.replace("user's", "user"))
    return path


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 photos: 24 blocks, time enough to kill somebody in the middle."""
    return make_photos(tmp_path_factory.mktemp("many"), count=48, seed=4)


# --- one machine ----------------------------------------------------------------------------------


@pytest.mark.soak
def test_ray_in_a_folder_with_packages_of_our_names(
    photos: Path, start: Callable[..., Command], teacher_files: dict[str, str], tmp_path: Path
) -> None:
    """Same bytes as in one process; nothing imported from there, sent anywhere, or left behind."""
    folder = hostile_folder(tmp_path / "project")
    command = start(photos, folder)
    assert until(command.statistics) == {"RAY_USAGE_STATS_ENABLED=0"}
    until(command.actors)
    code, out, err = command.end()
    assert (code, err) == (0, ""), err
    assert "executor: ray, 1 x teacher" in out
    until(command.all_gone, seconds=20)
    (tmp_path / "other").mkdir()
    assert tree(folder / STORE) == extract_here(photos, tmp_path / "other" / STORE, teacher_files)
    assert not (folder / STORE / ".staging").exists()


@pytest.mark.soak
def test_killed_workers_and_drivers_change_no_byte(
    many: Path, start: Callable[..., Command], teacher_files: dict[str, str], tmp_path: Path
) -> None:
    """SIGKILL of the driver after a commit; the same line again, and SIGKILL of a worker."""
    folder, moment = tmp_path / "killed", random.Random(3)
    first = start(many, folder)
    until(first.records)
    time.sleep(moment.uniform(0, 0.3))
    first.process.kill()
    first.process.communicate()
    assert 0 < first.records() < 48, "the driver was not killed in the middle"
    assert not (folder / STORE / "index.json").exists()
    # Not all_gone: an agent of Ray that was still starting when its raylet died may live on.
    until(lambda: not first.actors(), seconds=60)

    second = start(many, folder, "--replicas", 2)
    before = second.records()
    until(lambda: second.records() > before)
    victims = second.actors()
    assert len(victims) == 2
    os.kill(victims[0], signal.SIGKILL)
    at = second.records()
    code, out, err = second.end()
    assert (code, err) == (0, ""), err
    assert at < 48, "the worker was not killed in the middle"
    assert "resuming: " in out
    log = [json.loads(line) for line in (folder / STORE / "extract.log.jsonl").open()]
    failures = [entry for entry in log if entry["event"] == "failure"]
    assert [entry["attempt"] for entry in failures] in ([0], [0, 0])  # of its one or two blocks
    (tmp_path / "other").mkdir()
    assert tree(folder / STORE) == extract_here(many, tmp_path / "other" / STORE, teacher_files)
    until(second.all_gone, seconds=20)


def test_an_address_of_nothing(
    photos: Path, teacher_files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One clear error at once; left alone, Ray tries for many minutes."""
    began = time.monotonic()
    for address in ("127.0.0.1:1", "somewhere"):
        with pytest.raises(MilanError, match=rf"the Ray cluster at {address} cannot be reached: "):
            extract_targets(str(photos), out=str(tmp_path / STORE), address=address,
                            **teacher_files)  # fmt: skip
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:2")
    with pytest.raises(MilanError, match=r"127\.0\.0\.1:2 cannot be .*--executor local"):
        extract_targets(str(photos), out=str(tmp_path / STORE), **teacher_files)
    assert time.monotonic() - began < 60
    assert not (tmp_path / STORE).exists()


@pytest.mark.parametrize("scheme", ["", "ray://"])
@pytest.mark.parametrize(("answer", "said"), [(b"", "nothing for 0.3 s"), (b"220 mail", "not Ray")])
def test_an_address_of_something_else(
    scheme: str, answer: bytes, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another program listens there: Ray would try for a quarter of an hour."""
    from pipeline.cluster import connect

    monkeypatch.setattr(connect, "_ANSWER", 0.3)
    monkeypatch.setattr(connect.ray, "is_initialized", lambda: False)
    with socket.create_server(("127.0.0.1", 0)) as server:

        def reply() -> None:
            connection, _ = server.accept()
            connection.sendall(answer)
            time.sleep(1)
            connection.close()

        Thread(target=reply, daemon=True).start()
        address = f"{scheme}127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(MilanError, match=f"{address} cannot be reached: what .* {said}"):
            connect.connect(address)


def test_ray_does_not_look_for_uv(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under `uv run` it would pack the working folder and start workers by that command."""
    import ray
    from ray._private import worker
    from ray._private.runtime_env import uv_runtime_env_hook

    from pipeline.cluster.connect import connect

    environments: list[Any] = []
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(uv_runtime_env_hook, "_get_uv_run_cmdline", lambda: ["uv", "run", "x"])
    monkeypatch.setattr(uv_runtime_env_hook, "hook", lambda env: {"working_dir": "."})
    assert worker._maybe_modify_runtime_env({}, False) == {"working_dir": "."}
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(
        ray, "init",
        lambda **given: environments.append(worker._maybe_modify_runtime_env({}, False)),
    )  # fmt: skip
    assert connect(None)
    assert environments == [{}]
    assert worker._maybe_modify_runtime_env({}, False) == {"working_dir": "."}


def test_rays_sockets_find_room(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Below a TMPDIR that is short and exists; else below /tmp. RAY_TMPDIR is the user's own."""
    import ray

    from pipeline.cluster.connect import connect

    folders: list[str | None] = []
    for name in ("RAY_ADDRESS", "RAY_TMPDIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **given: folders.append(given.get("_temp_dir")))
    long = tmp_path / ("x" * 90)
    long.mkdir()
    for folder in ("/var/tmp", str(long), "/no/such/folder"):
        monkeypatch.setenv("TMPDIR", folder)
        monkeypatch.setattr(tempfile, "tempdir", None)
        assert connect(None)
    monkeypatch.setenv("RAY_TMPDIR", "/mine")
    assert connect(None)
    assert folders == ["/var/tmp/ray", "/tmp/ray", "/tmp/ray", None]


def test_no_worker_that_answers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A cluster without room, or workers that cannot start: it is said, and has a limit."""
    from milan.core import waiting
    from pipeline.cluster import pool
    from pipeline.cluster.connect import RemoteClass

    class Silent:
        """An actor that waits for its place."""

        def __getattr__(self, _: str) -> Any:
            return self

        def __call__(self, *_: Any, **more: Any) -> Any:
            return self

    def nothing(*_: Any, **more: Any) -> Any:
        raise pool.ray.exceptions.GetTimeoutError

    monkeypatch.setattr(pool, "connected", lambda _: nullcontext())
    monkeypatch.setattr(RemoteClass, "starter", lambda self, **more: Silent)
    monkeypatch.setattr(pool.ray, "wait", lambda tasks, timeout: ([], time.sleep(0.05)))
    monkeypatch.setattr(pool.ray, "get", nothing)
    monkeypatch.setattr(pool, "_LIMIT", 0.5)
    monkeypatch.setattr(waiting, "_FIRST_WORD", 0.1)
    notes = Notes()
    with pytest.raises(CacheError, match="in vain for a worker of Ray that starts or answers"):
        pool.map_blocks(
            RemoteClass("os", "_exit", {}), np.ones((2, 1), bool),
            pool.BlockCallbacks(
                folder_of=lambda *_: tmp_path, on_done=lambda *_: None,
                on_progress=lambda _: None, on_failure=lambda *_: None,
            ),
            pool.Replicas(count=1, gpus=2, blocks=2, address=None), attempts=3, progress=notes,
        )  # fmt: skip
    assert "each needs 1 core and 2 GPU" in notes.lines[0]
    assert "--executor local" in notes.lines[0]


def test_no_cluster_is_joined_unless_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even one that happens to run on this machine, which Ray by itself would join."""
    import ray

    from pipeline.cluster.connect import connect

    joined: list[str] = []
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **given: joined.append(given["address"]))
    assert connect(None)
    assert joined == ["local"]


# --- several nodes --------------------------------------------------------------------------------


@pytest.mark.soak
def test_ctrl_c(many: Path, start: Callable[..., Command], tmp_path: Path) -> None:
    """As a terminal sends it, to all processes: one line with what is kept, and nothing runs on."""
    command = start(many, tmp_path / "pressed")
    until(lambda: command.records() >= 4)
    os.killpg(command.process.pid, signal.SIGINT)
    code, _, err = command.end()
    kept = f"{command.records()} of 48 shards are in {STORE} and stay; the same line goes on"
    assert (code, err) == (130, f"milan: interrupted: {kept} with the others\n")
    until(command.all_gone)


@pytest.mark.soak
def test_a_node_that_dies(
    many: Path, start: Callable[..., Command], teacher_files: dict[str, str], tmp_path: Path
) -> None:
    """Two nodes, one killed in the middle: the other makes all of it, and no byte differs.

    The worker that replaces the lost one finds no place; what it was given is done by the other.
    """
    from ray.cluster_utils import Cluster

    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        mortal = nodes.add_node(num_cpus=1)
        nodes.wait_for_nodes()
        folder = tmp_path / "nodes"
        command = start(many, folder, "--address", nodes.address, "--replicas", 2)
        until(lambda: command.records() >= 4)
        nodes.remove_node(mortal, allow_graceful=False)
        at = command.records()
        code, out, err = command.end()
        assert (code, err) == (0, ""), err
        assert at < 48, "the node was not killed in the middle"
        assert "executor: ray, 2 x teacher" in out
    finally:
        nodes.shutdown()
    log = [json.loads(line) for line in (folder / STORE / "extract.log.jsonl").open()]
    assert any(entry["event"] == "failure" for entry in log)
    (tmp_path / "other").mkdir()
    assert tree(folder / STORE) == extract_here(many, tmp_path / "other" / STORE, teacher_files)
    assert not (folder / STORE / ".staging").exists()


@pytest.mark.soak
@pytest.mark.parametrize("killed", [False, True])
def test_pretraining_on_two_nodes(
    killed: bool, store: Path, tmp_path: Path, teacher_files: dict[str, str]
) -> None:
    """A rank on each node, told from here; one killed: all start again; one run in any case."""
    from ray.cluster_utils import Cluster

    import milan
    from pipeline.cluster.pretrain import pretrain_on_cluster

    alone, shared = tmp_path / "alone", tmp_path / "shared"
    settings: dict[str, Any] = {**SMALL, "log_every": 1, "save_every": 3, "epochs": 20}
    milan.pretrain(str(store), out=str(alone), **settings)
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    notes = Notes()
    try:
        nodes.add_node(num_cpus=1)
        nodes.wait_for_nodes()
        config = milan.PretrainConfig(
            str(store), out=str(shared), num_nodes=2, address=nodes.address, **settings
        )
        if killed:
            Thread(target=kill_a_rank, args=(shared / "log.jsonl",), daemon=True).start()
        figures = pretrain_on_cluster(config, progress=notes)
        with pytest.raises(MilanError, match="3 nodes with 1 cores each, of a cluster with"):
            pretrain_on_cluster(replace(config, num_nodes=3), progress=notes)
    finally:
        nodes.shutdown()
    assert (figures["finished"], figures["rank"]) == (True, 0)
    told = [line for line in notes.lines if line.startswith("steps: 60 of 8 images (2 x ")]
    assert len(told) == 1 + killed
    assert any("restart from the last checkpoint" in line for line in notes.lines) == killed
    ours, theirs = ([line["loss"] for line in log_of(run)] for run in (shared, alone))
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)


def kill_a_rank(log: Path) -> None:
    """SIGKILL one of this test's actors once training is on its way."""
    until(lambda: log.exists() and '"step": 8,' in log.read_text())
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            ours = b"test_pretraining_on_two_nodes" in (folder / "environ").read_bytes()
            if ours and b"ray::Host.call" in (folder / "cmdline").read_bytes():
                os.kill(int(folder.name), signal.SIGKILL)
                return
        except OSError:
            continue


# --- a running cluster ----------------------------------------------------------------------------

_TAG = "MILAN_TEST_TAG=cluster"
"""In the environment of the processes of the fixture `cluster`."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """A cluster that was there before, and stays: its address."""
    import ray

    from pipeline.cluster.connect import connect

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(*_TAG.split("="))
        assert connect(None)
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()


def test_a_node_that_does_not_come_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine Ray gives up after 30 s: it is started again, and in the end named."""
    from pipeline.cluster import connect as module

    late, calls = Exception("The current node timed out during startup.\nMore"), list[str]()
    monkeypatch.setattr(module.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(module.ray, "shutdown", lambda: calls.append("shutdown"))

    def init(**_: Any) -> None:
        calls.append("init")
        raise late

    monkeypatch.setattr(module.ray, "init", init)
    with pytest.raises(MilanError, match=r"Ray on this machine .*: The current node"):
        module.connect(None)
    assert calls == ["init", "shutdown", "init", "shutdown", "init"]


@pytest.mark.soak
def test_joining_a_cluster(
    cluster: str, photos: Path, start: Callable[..., Command], teacher_files: dict[str, str],
    tmp_path: Path,
) -> None:  # fmt: skip
    """--address: the work is done there, from any folder, and the cluster goes on living."""
    import ray

    folder = hostile_folder(tmp_path / "project")
    command = start(photos, folder, "--address", cluster, "--replicas", 2)
    code, out, err = command.end()
    assert (code, err) == (0, ""), err
    assert "executor: ray, 2 x teacher" in out
    (tmp_path / "other").mkdir()
    assert tree(folder / STORE) == extract_here(photos, tmp_path / "other" / STORE, teacher_files)
    assert ray.cluster_resources()["CPU"] >= 1


@pytest.mark.soak
def test_a_killed_worker_changes_no_byte(
    cluster: str, many: Path, teacher_files: dict[str, str], tmp_path: Path
) -> None:
    """SIGKILL after a commit: its block is another worker's, and the log tells of it."""
    store = tmp_path / "killed" / STORE
    store.parent.mkdir()
    killed: list[int] = []

    def kill() -> None:
        until(lambda: list((store / "generations/000/records").glob("*.json")))
        killed.extend(pid for pid, name in tagged(_TAG).items() if name.startswith("ray::Host"))
        os.kill(killed[0], signal.SIGKILL)

    killer = Thread(target=kill, daemon=True)
    killer.start()
    ray = {"executor": "ray", "replicas": 1, "num_workers": 1}
    files = extract_here(many, store, teacher_files, **ray)
    killer.join()
    assert len(killed) == 1
    log = [json.loads(line) for line in (store / "extract.log.jsonl").open()]
    failed = [entry["attempt"] for entry in log if entry["event"] == "failure"]
    assert failed in ([0], [0, 0])  # of its one or two blocks
    (tmp_path / "other").mkdir()
    assert files == extract_here(many, tmp_path / "other" / STORE, teacher_files)


def test_what_a_worker_refuses_ends_the_run(
    cluster: str, photos: Path, teacher_files: dict[str, str], tmp_path: Path
) -> None:
    """An error with a cause is told as it is, not tried three times; finished shards stay."""
    state = load_file(teacher_files["pretrained"])
    state["visual.proj"] = state["visual.proj"] * float("inf")
    save_file(state, tmp_path / "loud.safetensors")
    with pytest.raises(MilanError, match=r"output for row \d+ is not finite") as error:
        extract_targets(
            str(photos), out=str(tmp_path / STORE), views=2, batch_size=3,
            teacher=teacher_files["teacher"], pretrained=str(tmp_path / "loud.safetensors"),
        )  # fmt: skip
    assert type(error.value).__name__ == "TeacherError"
    assert not (tmp_path / STORE / ".staging").exists()


def test_a_worker_that_refuses_to_start_ends_the_run(cluster: str, tmp_path: Path) -> None:
    """Another teacher, no such device: once, and in its own words."""
    from pipeline.cluster.connect import RemoteClass
    from pipeline.cluster.pool import BlockCallbacks, Replicas, map_blocks

    with pytest.raises(MilanError, match="another teacher"):
        map_blocks(
            RemoteClass("tests.cluster.paper_worker", "Refusing", {}),
            np.ones((4, 1), bool),
            BlockCallbacks(
                folder_of=lambda block, attempt: tmp_path / f"{block}.{attempt}",
                on_done=lambda *_: pytest.fail("there is nothing to commit"),
                on_progress=lambda _: None,
                on_failure=lambda block, attempt, why: pytest.fail(why),
            ),
            Replicas(count=1, gpus=0, blocks=2, address=None),
            attempts=3,
        )


@pytest.mark.soak
def test_a_block_that_always_fails_is_given_up(cluster: str, tmp_path: Path) -> None:
    """A worker that dies each time: three attempts, then the block is named with a reason."""
    from pipeline.cluster.connect import RemoteClass
    from pipeline.cluster.pool import BlockCallbacks, Replicas, map_blocks

    failures: list[tuple[int, int]] = []
    lost = map_blocks(
        RemoteClass("os", "_exit", {"status": 1}),  # ends its process as soon as it is built
        np.arange(8)[:, None] == [7, 7],  # block 7, both views
        BlockCallbacks(
            folder_of=lambda block, attempt: tmp_path / f"{block}.{attempt}",
            on_done=lambda *_: pytest.fail("there is nothing to commit"),
            on_progress=lambda _: None,
            on_failure=lambda block, attempt, why: failures.append((block, attempt)),
        ),
        Replicas(count=1, gpus=0, blocks=2, address=None),
        attempts=3,
    )
    assert failures == [(7, 0), (7, 1), (7, 2)]
    assert list(lost) == [7]
    assert lost[7]


@pytest.mark.soak
def test_one_slow_worker_does_not_hold_the_tail(
    cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last block hangs on one worker: an idle one makes it, once, and the run ends."""
    from pipeline.cluster.connect import RemoteClass
    from pipeline.cluster.pool import BlockCallbacks, Replicas, map_blocks

    monkeypatch.setattr("pipeline.cluster.pool._BACKUP_SECONDS", 1.0)
    done: list[tuple[int, str]] = []
    began = time.monotonic()
    arguments = {"folder": str(tmp_path), "slow": 2, "seconds": 300}
    lost = map_blocks(
        RemoteClass("tests.cluster.paper_worker", "Paper", arguments),
        np.ones((8, 2), bool),
        BlockCallbacks(
            folder_of=lambda block, attempt: tmp_path / f"{block}.{attempt}",
            on_done=lambda block, folder, records: done.append((block, folder.name)),
            on_progress=lambda _: None,
            on_failure=lambda block, attempt, why: pytest.fail(why),
        ),
        Replicas(count=2, gpus=0, blocks=2, address=None),
        attempts=3,
    )
    assert time.monotonic() - began < 120
    assert lost == {}
    assert sorted(block for block, _ in done) == list(range(8))
    assert dict(done)[2] == "2.1"
