"""`milan doctor`: each thing that would fail is a finding, and nothing is left behind."""

from __future__ import annotations

import os
import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
from helpers import run_here

import pipeline.doctor
from milan.data import feeding
from milan.errors import MilanError, TrainError
from pipeline.cluster import connect
from pipeline.cluster.node import Node, versions
from pipeline.config import ExtractConfig
from pipeline.doctor import FAILS, OK, WARNING, Finding, diagnose


@pytest.fixture
def good(photos: Path, teacher_files: dict[str, str], tmp_path: Path) -> ExtractConfig:
    """Settings that work here."""
    return ExtractConfig(str(photos), out=str(tmp_path / "new" / "t.zarr"), **teacher_files)


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device whose rate is known."""
    monkeypatch.setattr(pipeline.doctor, "student_rate", lambda device: 20.0)


def found(findings: list[Finding], what: str) -> Finding:
    """The one finding about it."""
    (finding,) = (finding for finding in findings if finding.what == what)
    return finding


def test_all_is_well(good: ExtractConfig, tmp_path: Path) -> None:
    """A finding for everything that was looked at; the store's folder is not even made."""
    findings = diagnose(good)
    assert {finding.state for finding in findings} <= {OK, WARNING}
    assert found(findings, "store").found.startswith(f"{good.out}: rename, fsync and lock work, ")
    assert found(findings, "data").found.startswith(f"{good.data}: 24 images")
    assert str(good.pretrained) in found(findings, "teacher").found
    assert "a core loads" in found(findings, "data loading").found
    assert os.listdir(tmp_path) == []


FAILING: dict[str, tuple[dict[str, Any], str, str]] = {
    "store": ({"out": "/proc/milan/t.zarr"}, "cannot be written", "--out a folder of your own"),
    "store in a file": (
        {"out": "{tmp}/letter.txt/t.zarr"},
        "cannot be written: Not a directory",
        "--out",
    ),
    "store elsewhere": ({"out": "gs://bucket/t.zarr"}, "cannot be written to gs", "write to"),
    "device": ({"device": "cuda:7"}, "--device cuda:7", "--device auto or cpu"),
    "teacher": ({"teacher": "ViT-B-61"}, "unknown teacher", "--teacher ViT-B-16"),
    "teacher without weights": ({"pretrained": "none.pt"}, "neither a file nor a tag", ""),
    "teacher offline": (
        {"teacher": "ViT-B-16-quickgelu", "pretrained": None, "offline": True},
        "--offline, and the weights openai of ViT-B-16-quickgelu are not here",
        "place open_clip_model.safetensors of https://huggingface.co/timm/",
    ),
    "teacher of timm offline": (
        {"teacher": "timm:vit_tiny_patch16_224", "pretrained": None, "offline": True},
        "of timm:vit_tiny_patch16_224 are not here",
        "place model.safetensors",
    ),
    "data": ({"data": "nowhere"}, "no data found", "--data-root"),
    "data without images": ({"data": "{tmp}"}, "no images in", ""),
    "data that cannot be decoded": ({"data": "{tmp}/bad"}, "none of the first", "milan plan"),
}


@pytest.mark.usefixtures("fast")
@pytest.mark.parametrize("case", FAILING)
def test_what_will_not_work(
    case: str, good: ExtractConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Says so with its remedy, and still looks at the rest; nothing is left."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # go_offline sets it
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    (tmp_path / "letter.txt").write_text("x")
    if "{tmp}/bad" in FAILING[case][0].values():
        (tmp_path / "bad").mkdir()
        (tmp_path / "bad/a.jpg").write_bytes(b"\xff\xd8\xff no image")
    before = sorted(tmp_path.rglob("*"))
    changes, text, remedy = FAILING[case]
    changes = {k: v.format(tmp=tmp_path) if v and k != "offline" else v for k, v in changes.items()}
    findings = diagnose(replace(good, **changes))
    failed = [finding for finding in findings if finding.state == FAILS]
    assert {finding.what.split()[0] for finding in failed} <= {case.split()[0]}
    assert failed
    assert text in failed[0].found
    assert remedy in failed[0].remedy
    assert {"software", "shared memory", "data"} <= {finding.what for finding in findings}
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.usefixtures("fast")
def test_what_is_scarce(good: ExtractConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too few open files, little memory or disk, no shared memory, a GPU that torch cannot use, and
    a device that is faster than the loader."""

    def no_room(context: Any, workers: int) -> None:
        raise TrainError("no room for the locks", fix="docker run --shm-size 1g")

    monkeypatch.setattr(feeding, "open_files", lambda: 64)
    monkeypatch.setattr(pipeline.doctor, "free_memory", lambda: 1 << 30)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 8, 1))  # type: ignore[attr-defined]
    monkeypatch.setattr(pipeline.doctor, "check_locks", no_room)
    monkeypatch.setattr(pipeline.doctor, "_DRIVER", Path("/proc/self/stat"))
    monkeypatch.setattr(pipeline.doctor, "student_rate", lambda device: 1e7)
    findings = diagnose(good)
    remedies = {f.what: f.remedy for f in findings if f.state == WARNING}
    assert remedies["open files"].startswith("ulimit -n 65536")
    assert "--num-workers" in remedies["memory and cores"]
    assert "milan plan" in remedies["store"]
    assert "pytorch.org" in remedies["device"]
    assert "--store-views jpeg:95" in remedies["data loading"]
    assert found(findings, "shared memory").state == FAILS
    assert found(findings, "shared memory").remedy == "docker run --shm-size 1g"


@pytest.mark.usefixtures("fast")
def test_every_node_is_asked(
    good: ExtractConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another version, a path that is not seen, no answer: a finding for each node."""
    asked: list[list[str]] = []

    def answers(
        address: str, node: connect.RemoteClass, method: str, paths: list[str], *, seconds: float
    ) -> dict[str, Any]:
        asked.append(paths)
        assert all(Path(path).exists() for path in paths)
        here = Node().look([*paths, str(tmp_path / "none")])
        assert here == (versions(), [str(tmp_path / "none")])
        return {
            "a": Node().look(paths),
            "b": ({**versions(), "ray": "2.0"}, []),
            "c": (versions(), paths[:1]),
            "d": MilanError("no answer within 12 s"),
        }

    monkeypatch.setattr(connect, "ask_every_node", answers)
    findings = diagnose(replace(good, address="head:6379"))
    assert found(findings, "node a").found.endswith(f", sees {good.out}, {good.data}")
    assert found(findings, "node b").found == f"ray 2.0, here {versions()['ray']}"
    assert found(findings, "node c").found == f"does not see {good.out}"
    assert "all machines share" in found(findings, "node c").remedy
    assert [found(findings, f"node {n}").state for n in "abcd"] == [OK, FAILS, FAILS, FAILS]
    assert not any(Path(path).exists() for path in asked[0] if path != good.data)


def test_nodes_that_do_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two on one host have names of their own; a dead node is not asked; each actor is ended."""
    ended, names = list[Any](), {"one": "11" * 28, "two": "22" * 28, "three": "33" * 28}

    class Actor:
        def __init__(self, scheduling_strategy: Any) -> None:
            self.node, self.call = scheduling_strategy.node_id, self

        def remote(self, method: str, *arguments: Any) -> Any:
            self.asked = (method, *arguments)
            return self

    def get(task: Any) -> Any:
        if task.node == names["three"]:
            raise ray.exceptions.RayError("why\nno milan there")
        return "result", task.asked

    def wait(tasks: list[Any], **_: Any) -> tuple[list[Any], list[Any]]:
        late = [task for task in tasks if task.node == names["two"]]
        return [task for task in tasks if task not in late], late

    nodes = [("one", "h", True), ("two", "h", True), ("three", "g", True), ("four", "f", False)]
    alive = [
        {"NodeID": names.get(name, ""), "NodeManagerHostname": host, "Alive": lives}
        for name, host, lives in nodes
    ]
    monkeypatch.setattr(connect, "connected", lambda address: nullcontext())
    monkeypatch.setattr(connect.RemoteClass, "starter", lambda self, **options: Actor)
    for name, function in {
        "nodes": lambda: alive,
        "get": get,
        "kill": ended.append,
        "wait": wait,
    }.items():
        monkeypatch.setattr(ray, name, function)
    asked = connect.RemoteClass("pipeline.cluster.node", "Node", {})
    answers = connect.ask_every_node("a", asked, "look", ["x"], seconds=3)
    told = {name: getattr(answer, "found", answer) for name, answer in answers.items()}
    assert told == {
        "g": "no milan there",
        "h": ("look", ["x"]),
        "h (22222222)": "no answer within 3 s",
    }
    assert len(ended) == 3


def test_a_cluster_that_is_not_there(good: ExtractConfig) -> None:
    finding = found(diagnose(replace(good, data="", address="127.0.0.1:1")), "cluster")
    assert (finding.state, finding.remedy) == (
        FAILS,
        "without Ray: --executor local for extraction, torchrun for pretraining",
    )


@pytest.mark.usefixtures("fast")
def test_the_command(good: ExtractConfig) -> None:
    """A table, and exit code 1 if something fails; data need not be named."""
    line = ["doctor", "--teacher", good.teacher, "--pretrained", good.pretrained, "--out", good.out]
    ran = run_here(*line)
    assert (ran.code, ran.err) == (0, "")
    assert "none named" in ran.out
    ran = run_here(*line, "--data", "nowhere")
    assert ran.code == 1
    assert "milan: 1 of" in ran.err
    assert "FAILS" in ran.out


@pytest.mark.soak
def test_a_real_cluster(
    good: ExtractConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two nodes of Ray on this machine: both have the same milan and see both paths."""
    from ray.cluster_utils import Cluster

    monkeypatch.setattr(pipeline.doctor, "_NODES", 100)  # this machine may be busy
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        nodes.add_node(num_cpus=1)
        findings = diagnose(replace(good, address=nodes.address))
    finally:
        nodes.shutdown()
    asked = [finding for finding in findings if finding.what.startswith("node ")]
    assert [finding.state for finding in asked] == [OK, OK]
    assert all(f"sees {good.out}, {good.data}" in finding.found for finding in asked)
    assert os.listdir(tmp_path) == []
