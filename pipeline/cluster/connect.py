"""A Ray cluster: joined by its address, or started on this machine; and the actors that run there.

Milan never joins a cluster that was not named, and sends no usage statistics.
"""

from __future__ import annotations

import logging
import os
import pickle
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray._private import ray_constants

from milan.core.signals import short_folder
from milan.errors import MilanError

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

_STARTS = 3  # of a node of this machine, which may be busy
_ANSWER = 10.0  # seconds in which a cluster's server has to answer
_ROOT = str(Path(__file__).resolve().parents[2])


def connect(address: str | None) -> bool:
    """Join the cluster at `address` or $RAY_ADDRESS, or start Ray on this machine.

    Returns whether the caller must shut Ray down: False if this process was connected before.
    Raises MilanError if the cluster cannot be reached.
    """
    if ray.is_initialized():
        return False
    target = address or os.environ.get("RAY_ADDRESS")
    local: dict[str, Any] = {"include_dashboard": False, "object_store_memory": 100 << 20}
    if "RAY_TMPDIR" not in os.environ:  # Ray takes TMPDIR as it is: missing, or too long
        local["_temp_dir"] = os.path.join(short_folder(36), "ray")
    try:
        if target:
            _probe(target)
        with _without_uv():
            _init(
                address=target or "local",  # not a cluster that happens to run on this machine
                log_to_driver=False,
                logging_level=logging.ERROR,
                **({} if target else local),
            )
    except Exception as error:  # a node that does not come up is a bare one
        where = f"the Ray cluster at {target}" if target else "Ray on this machine"
        raise MilanError(
            f"{where} cannot be reached: {str(error).splitlines()[0]}",
            fix="without Ray: --executor local for extraction, torchrun for pretraining",
        ) from None
    return True


def _init(**arguments: Any) -> None:
    """Start or join Ray; a node that did not come up in Ray's own 30 s is started again."""
    for attempt in range(_STARTS):
        try:
            ray.init(**arguments)
            return
        except Exception as error:
            if type(error) is not Exception or attempt + 1 == _STARTS:
                raise
            ray.shutdown()


@contextmanager
def _without_uv() -> Iterator[None]:
    """Inside, Ray does not look whether it runs under `uv run`.

    It would pack the working folder, which it refuses above 512 MB, and start workers by the same
    command in another folder. Our workers need this Python and nothing of the folder.
    """
    name = "RAY_ENABLE_UV_RUN_RUNTIME_ENV"
    before = getattr(ray_constants, name, None)
    setattr(ray_constants, name, False)
    try:
        yield
    finally:
        setattr(ray_constants, name, before)


@contextmanager
def connected(address: str | None) -> Iterator[None]:
    """Inside, this process is connected as by `connect`; afterwards as it was before."""
    ours = connect(address)
    try:
        yield
    finally:
        if ours:
            ray.shutdown()


def cluster_nodes(address: str | None) -> list[tuple[int, int]]:
    """(cores, GPUs) of each node of the cluster at `address` or $RAY_ADDRESS that has cores."""
    with connected(address):
        resources = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    nodes = [(int(r.get("CPU", 0)), int(r.get("GPU", 0))) for r in resources if r.get("CPU")]
    if not nodes:
        raise MilanError(
            f"the Ray cluster at {address or os.environ.get('RAY_ADDRESS')} has no cores",
            expected="nodes on which workers may run",
        )
    return nodes


def ask_every_node(
    address: str | None, asked: RemoteClass, method: str, *arguments: Any, seconds: float
) -> dict[str, Any]:
    """host -> what `method` of an instance of `asked` says on that node of the cluster.

    A node that does not answer in time, or on which the class cannot be built, has a MilanError.
    """
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    with connected(address):
        start, answers, actors = asked.starter(num_cpus=0), dict[str, Any](), dict[str, Any]()
        for node in ray.nodes():
            if node["Alive"]:
                strategy = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
                host = node["NodeManagerHostname"]
                name = host if host not in actors else f"{host} ({node['NodeID'][:8]})"
                actors[name] = start(scheduling_strategy=strategy)
        tasks = {actor.call.remote(method, *arguments): name for name, actor in actors.items()}
        ready, late = ray.wait(list(tasks), num_returns=len(tasks), timeout=seconds)
        for task in ready:
            try:
                answers[tasks[task]] = value_of(ray.get(task))
            except (MilanError, ray.exceptions.RayError) as error:
                answers[tasks[task]] = MilanError(last_line(error))
        for task in late:
            answers[tasks[task]] = MilanError(f"no answer within {seconds:g} s")
        for actor in actors.values():
            ray.kill(actor)
    return dict(sorted(answers.items()))


def _probe(address: str) -> None:
    """Raise OSError unless Ray answers at host:port; Ray itself would try for a quarter of an hour.

    Whatever speaks gRPC begins with HTTP/2's SETTINGS frame. Under TLS any answer will do.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not (host and port.isdecimal()):
        return
    with socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER) as connection:
        connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]))
        try:
            frame = connection.recv(9)
        except TimeoutError:
            raise OSError(f"what listens there says nothing for {_ANSWER:g} s") from None
    if frame[3:4] != b"\x04" and os.environ.get("RAY_USE_TLS", "0") == "0":
        raise OSError("what listens there is not Ray")


@dataclass(frozen=True)
class RemoteClass:
    """A class by its name, with the arguments it is built with: both are resolved on its node."""

    module: str
    name: str
    arguments: dict[str, Any]
    """Of its constructor; pickled."""

    def starter(self, **options: Any) -> Callable[..., Any]:
        """A function that starts an actor which hosts an instance, with these options of Ray.

        The function takes further options. Ray never restarts such an actor by itself.
        """
        actor: Any = ray.remote(_host_class())
        payload = (_ROOT, self.module, self.name, pickle.dumps(self.arguments))
        return lambda **more: actor.options(max_restarts=0, **options, **more).remote(*payload)


def value_of(reply: tuple[str, Any]) -> Any:
    """The value in what `Host.call` returns; raises the MilanError that the call raised."""
    kind, value = reply
    if kind == "error":
        raise pickle.loads(value)
    return value


def last_line(error: Exception) -> str:
    """The last line of an error's text, which in Ray's errors names the cause."""
    return str(error).strip().splitlines()[-1][:200]


def _host_class() -> type:
    """The actor's class. Local to this function, so that it is pickled by value: loading it on
    another node imports nothing of ours."""

    class Host:
        def __init__(self, root: str, module: str, name: str, payload: bytes) -> None:
            import importlib
            import os
            import pickle
            import sys

            # A worker's path begins with the driver's folder, which may have another package called
            # `milan`: put ours first, and forget what came from elsewhere. On another node `root`
            # may not exist; there the installed package is used, once the driver's folder is out of
            # the way. For `pipeline` and `stages` milan.core.beside sees to that.
            installed = os.path.isdir(os.path.join(root, "pipeline"))
            here = os.path.realpath(os.getcwd())
            sys.path[:] = [p for p in sys.path if p and os.path.realpath(p) != here]
            if installed:
                sys.path.insert(0, root)
            for loaded in list(sys.modules):
                if loaded.split(".")[0] in ("milan", "pipeline", "stages"):
                    del sys.modules[loaded]
            from milan.core.beside import ours

            self.ours = ours()  # for as long as the actor lives
            self.ours.__enter__()
            start = getattr(importlib.import_module(module), name)
            from milan.errors import MilanError

            self.refusal: bytes | None = None
            try:
                self.worker = start(**pickle.loads(payload))
            except MilanError as error:  # the answer to every call; a crash would be tried again
                self.refusal = pickle.dumps(error)

        def call(self, method: str, *arguments: Any) -> tuple[str, Any]:
            import pickle

            from milan.errors import MilanError

            if self.refusal:
                return "error", self.refusal
            try:
                return "result", getattr(self.worker, method)(*arguments)
            except MilanError as error:
                return "error", pickle.dumps(error)

        def read(self, name: str) -> Any:
            return getattr(self.worker, name)

        def node(self) -> str:
            import ray

            return ray.util.get_node_ip_address()

    return Host
