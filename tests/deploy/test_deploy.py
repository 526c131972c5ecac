"""deploy/: what can be said of an image, a Slurm script and a Ray job where none of them runs."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import ROOT

from stages.cli import app

DEPLOY = ROOT / "deploy"
SCRIPT = DEPLOY / "pretrain.sbatch"


@pytest.mark.parametrize(
    ("linter", "file"),
    [("hadolint", "Dockerfile"), ("shellcheck", "pretrain.sbatch")],
)
def test_lint(linter: str, file: str) -> None:
    """Also with what the linter only advises."""
    found = shutil.which(linter)
    if found is None:
        pytest.skip(f"{linter} is absent: deploy/{file} is not linted")
    done = subprocess.run([found, str(DEPLOY / file)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def checked(line: str) -> None:
    """Assert that a command line is one that `milan` takes."""
    import typer

    command, *arguments = shlex.split(line)
    assert command == "milan"
    group: Any = typer.main.get_command(app)
    context = group.make_context("milan", [arguments[0], "--help"], resilient_parsing=True)
    stage = group.get_command(context, arguments[0])
    stage.make_context(arguments[0], arguments[1:])  # raises for what it does not know


def test_the_image() -> None:
    """Runs as a user, copies what there is, says what it takes of shared memory."""
    text = (DEPLOY / "Dockerfile").read_text()
    steps = re.sub(r"^#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ").splitlines()
    assert [s.split()[1] for s in steps if s.startswith("USER")] == ["1000"]
    assert steps.index("USER 1000") > max(i for i, s in enumerate(steps) if s.startswith("RUN"))
    copied = [s.split()[1:-1] for s in steps if s.startswith("COPY") and "--from" not in s]
    assert all((ROOT / name).exists() for names in copied for name in names)
    packages = {"milan", "pipeline", "stages"}
    assert packages <= {name for names in copied for name in names}
    assert 'ENTRYPOINT ["milan"]' in steps
    extras = set(re.findall(r"'\.\[(.*?)\]'", text)[0].split(","))
    project = (ROOT / "pyproject.toml").read_text()
    assert all(re.search(rf"^{extra} = \[", project, re.MULTILINE) for extra in extras)
    assert "--shm-size 8g" in text
    shown = re.sub(r"\\\n# +", "", text[: text.index("\n# --shm-size")])
    checked("milan " + shown.rpartition(" milan ")[2].strip().rstrip("#").strip())


def test_the_ray_job() -> None:
    """Its command is one of ours; every pod has shared memory, the same folder, and no root."""
    job = yaml.safe_load((DEPLOY / "extract.rayjob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    checked(job["spec"]["entrypoint"])
    cluster = job["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for group in groups:
        pod = group["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"]
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert volumes["shm"]["emptyDir"]["medium"] == "Memory"
        for container in pod["containers"]:
            mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
            assert mounts == {"shared": "/shared", "shm": "/dev/shm"}
            assert volumes.keys() == mounts.keys()
    words = shlex.split(job["spec"]["entrypoint"])
    assert all(words[words.index(flag) + 1].startswith("/shared") for flag in ("--data", "--out"))
    assert groups[1]["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]


@pytest.fixture
def slurm(tmp_path: Path) -> Path:
    """Stand-ins for srun and scontrol on the PATH: the run ends with $CODE, or when signalled."""
    folder = tmp_path / "bin"
    folder.mkdir()
    run = '#!/bin/bash\necho "$@" > "$OUT/line"\n'
    at = "sleep 0.1; echo $s >> '$OUT/signals'; exit 75"
    run += f'for s in USR1 TERM; do trap "{at}" $s; done\n'
    run += 'touch "$OUT/started"\n[ -n "$CODE" ] && exit "$CODE"\n'
    run += "while true; do sleep 0.02; done\n"
    for name, text in {"srun": run, "scontrol": '#!/bin/bash\necho "$@" >> "$OUT/queue"\n'}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return tmp_path


@pytest.mark.parametrize(
    ("code", "sent", "left", "queued"),
    [
        ("", signal.SIGUSR1, 75, True),
        ("", signal.SIGTERM, 75, True),
        ("0", None, 0, False),
        ("1", None, 1, False),
    ],
)
def test_the_slurm_script(
    code: str, sent: signal.Signals | None, left: int, queued: bool, slurm: Path
) -> None:
    """Passes signals on, waits for the checkpoint, and queues the job again after 75 alone."""
    environment = os.environ | {"OUT": str(slurm), "CODE": code, "SLURM_JOB_ID": "17"}
    environment["PATH"] = f"{slurm / 'bin'}:{environment['PATH']}"
    line = ["bash", str(SCRIPT), "--cache", "a store.zarr", "--out", "runs/a"]
    process = subprocess.Popen(line, env=environment)
    end = time.monotonic() + 60
    while not (slurm / "started").exists():
        assert time.monotonic() < end
        time.sleep(0.01)
    if sent:
        process.send_signal(sent)
    assert process.wait(60) == left
    assert (slurm / "line").read_text() == "milan pretrain --cache a store.zarr --out runs/a\n"
    queue = slurm / "queue"
    assert (queue.read_text() if queue.exists() else "") == ("requeue 17\n" if queued else "")
    if sent:
        assert (slurm / "signals").read_text() == sent.name.removeprefix("SIG") + "\n"


def test_a_command_that_is_none_is_seen() -> None:
    """The check above can fail."""
    with pytest.raises(Exception, match="No such option"):
        checked("milan extract-targets --dta x")
