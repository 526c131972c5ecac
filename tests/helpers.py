"""What the tests share: settings of a small teacher, student and run, and plain functions."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from contextlib import chdir, redirect_stderr, redirect_stdout, suppress
from multiprocessing import forkserver, spawn
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from milan.core import remote
from milan.core.signals import STOPPING
from milan.models.masking import Mask
from milan.objectives.base import Objective
from pipeline.extract import extract_targets

ROOT = Path(__file__).resolve().parent.parent
CASES = ROOT / "tests" / "cases"
"""Small inputs of people's own sets that once failed."""
SHARED = ROOT.parent / "shared" / "data"
MILAN = str(Path(sys.executable).parent / "milan")
STORE = "t.zarr"
"""Where a Command writes."""

TEACHER = {
    "embed_dim": 24,
    "quick_gelu": True,
    "vision_cfg": {
        "image_size": 32, "layers": 2, "width": 32, "patch_size": 8, "head_width": 16
    },
    "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1},
}  # fmt: skip
STUDENT = {
    "model_args": {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2},
    "decoder": {"embed_dim": 16, "depth": 2, "num_heads": 2},
}
"""A student that fits TEACHER's grid of 4 x 4 patches."""
EXTRACTION: dict[str, Any] = {
    "views": 2, "shard_size": 8, "batch_size": 7, "executor": "local"
}  # fmt: skip
"""Those of the fixture `store`."""
SMALL: dict[str, Any] = {
    **STUDENT, "epochs": 7, "batch_size": 8, "num_workers": 0, "lr": 1e-3, "log_every": 4,
}  # fmt: skip
"""3 steps an epoch, 21 steps."""
WATCHED: dict[str, Any] = {
    **SMALL, "epochs": 8, "lr": 3e-3, "held_out": 0.34, "probe_every": 3, "picture_every": 4,
}  # fmt: skip
"""8 of the 24 images are held out: 2 steps an epoch, 16 in all."""


def make_photos(folder: Path, *, count: int = 24, classes: int = 3, seed: int = 0) -> Path:
    """Class folders of JPEGs: smooth random pictures of several sizes, 40 to 120 pixels."""
    generator = np.random.default_rng(seed)
    for i in range(count):
        height, width = generator.integers(40, 121, 2)
        coarse = generator.integers(0, 256, (5, 7, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((int(width), int(height)), Image.Resampling.BICUBIC)
        path = folder / f"class {i % classes}" / f"bild {i:02d} ü.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, quality=90)
    return folder


SHAPES = ("square", "disc", "triangle")


def draw_scenes(
    folder: Path,
    *,
    count: int = 12,
    seed: int = 0,
    size: tuple[int, int] = (96, 128),
    masks: bool = True,
) -> Path:
    """`folder` with images of (height, width) `size`, and annotations.json as COCO has it.

    On each are one to three shapes that do not touch, each class in a colour of its own. Masks are
    polygons, those of discs run lengths.
    """
    from PIL import ImageDraw

    generator, (height, width) = np.random.default_rng(seed), size
    colours = {"square": (230, 40, 40), "disc": (40, 200, 60), "triangle": (50, 60, 230)}
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        picture = Image.new("RGB", (width, height), (128, 128, 128))
        pen = ImageDraw.Draw(picture)
        for part in range(int(generator.integers(1, 4))):
            edge = int(generator.integers(16, 30))
            left = part * width // 3 + int(generator.integers(2, width // 3 - edge))
            top = int(generator.integers(2, height - edge - 2))
            right, bottom = left + edge, top + edge
            kind = int(generator.integers(3))
            name = SHAPES[kind]
            corners = [(left, top), (right, top), (right, bottom), (left, bottom)]
            if name == "triangle":
                corners = [(left, bottom), (right, bottom), (left + edge // 2, top)]
            if name == "disc":
                pen.ellipse((left, top, right - 1, bottom - 1), fill=colours[name])
            else:
                pen.polygon([(x - (x > left), y - (y > top)) for x, y in corners], colours[name])
            entry: dict[str, Any] = {
                "id": len(annotations) + 1, "image_id": i + 1, "category_id": kind + 3,
                "bbox": [left, top, edge, edge], "area": edge * edge, "iscrowd": 0,
            }  # fmt: skip
            if masks and name == "disc":
                green = np.asarray(picture)[..., 1] == 200
                green &= np.asarray(picture)[..., 0] == 40
                inside = np.zeros_like(green)
                inside[top:bottom, left:right] = green[top:bottom, left:right]
                flat = np.concatenate([[0], inside.T.reshape(-1), [0]])
                ends = np.flatnonzero(np.diff(flat))
                runs = np.diff([0, *ends, height * width]).tolist()
                entry["segmentation"] = {"size": [height, width], "counts": runs}
            elif masks:
                entry["segmentation"] = [[float(x) for corner in corners for x in corner]]
            annotations.append(entry)
        picture.save(folder / f"scene {i:02d}.png")
        images.append(
            {"id": i + 1, "file_name": f"scene {i:02d}.png", "height": height, "width": width}
        )
    content = {
        "images": images, "annotations": annotations,
        "categories": [{"id": k + 3, "name": name} for k, name in enumerate(SHAPES)],
    }  # fmt: skip
    (folder / "annotations.json").write_text(json.dumps(content))
    return folder


def tree(root: Path) -> dict[str, bytes]:
    """The files of a store that must not vary between runs: arrays, records, manifest, index."""
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file()
        and not path.relative_to(root).as_posix().startswith((".staging", ".lock", "extract.log"))
    }


def forget() -> None:
    """Drop connections to buckets and what they know, as in a new process."""
    import fsspec

    remote._filesystem.cache_clear()
    fsspec.get_filesystem_class("s3").clear_instance_cache()


class Ran(NamedTuple):
    """What a command run in this process did."""

    code: int
    out: str
    err: str


def last_wins(*words: object) -> list[str]:
    """The words of a line in which a flag that stands twice stands as the last one has it: what
    a test asks for in place of what all have. Those of --set count by their key."""
    groups: list[list[str]] = [[]]
    for word in map(str, words):
        if word.startswith("--"):
            groups.append([])
        groups[-1].append(word)
    kept: dict[str, list[str]] = {}
    for group in groups:
        flag = group[0] if group else ""
        name = flag + group[1].partition("=")[0] if flag == "--set" else flag.partition("=")[0]
        kept.pop(name, None)
        kept[name] = group
    return [word for group in kept.values() for word in group]


def run_here(*arguments: object, cwd: Path | None = None) -> Ran:
    """`milan` with `arguments`, by its entry point in this process: torch is loaded only once.

    For tests of what a command does and says; those of the process itself use `milan`.
    """
    from stages import cli

    torch.set_num_threads(1)
    out, err, before = io.StringIO(), io.StringIO(), sys.argv
    sys.argv, code = ["milan", *map(str, arguments)], 0
    try:
        with chdir(cwd or Path.cwd()), redirect_stdout(out), redirect_stderr(err):
            cli.main()
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else int(left.code is not None)
    finally:
        sys.argv = before
    return Ran(code, out.getvalue(), err.getvalue())


class Bomb:
    """Makes the folder `exploded` where it is unpickled."""

    def __reduce__(self) -> tuple:
        return (os.mkdir, ("exploded",))


class Notes:
    """Progress that keeps what it is given."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.begun: list[tuple[int, int]] = []

    def note(self, text: str) -> None:
        self.lines.append(text)

    def begin(self, what: str, total: int, unit: str, *, done: int = 0) -> None:
        self.begun.append((total, done))

    def advance(self, done: int, figures: str = "") -> None:
        pass

    def end(self) -> None:
        pass

    def line(self, start: str) -> str:
        """The one note that begins so."""
        (line,) = (line for line in self.lines if line.startswith(start))
        return line


class At(Notes):
    """Progress that does something once so many steps are done."""

    def __init__(self, step: int, act: Callable[[], None]) -> None:
        super().__init__()
        self.step, self.act, self.acted = step, act, False

    def advance(self, done: int, figures: str = "") -> None:
        if done == self.step and not self.acted:  # it is called between two batches as well
            self.acted = True
            self.act()


def rows_seen(monkeypatch: pytest.MonkeyPatch) -> tuple[list[int], list[int]]:
    """(rows that students are trained on, rows that they are validated on) from here on, in order;
    both are filled while runs go on."""
    trained, validated, predict = list[int](), list[int](), Objective.predict

    def noted(objective: Any, student: Any, batch: Any) -> Any:
        (trained if student.training else validated).extend(batch.rows.tolist())
        return predict(objective, student, batch)

    monkeypatch.setattr(Objective, "predict", noted)
    return trained, validated


def json_changes(value: dict[str, Any]) -> list[Any]:
    """Other JSON: `value` with parts missing or of other kinds, in it and one level below."""
    changed: list[Any] = [None, 3, "x", [], {}]
    for key, part in value.items():
        changed.append({k: v for k, v in value.items() if k != key})
        changed += [value | {key: other} for other in (None, -1, "x", [], [3], {}, {"a": 1})]
        for inner in list(part)[:3] if isinstance(part, dict) else ():
            less = {k: v for k, v in part.items() if k != inner}
            changed += [value | {key: less}, value | {key: part | {inner: [None]}}]
    return [other for other in changed if other != value]


def weights(run: Path) -> dict[str, bytes]:
    """Bytes of the encoder and of the newest checkpoint's parameters and moments."""
    newest = max((run / "checkpoints").iterdir())
    return {
        "encoder": (run / "encoder.safetensors").read_bytes(),
        "model": (newest / "model.safetensors").read_bytes(),
        "moments": (newest / "optimiser.safetensors").read_bytes(),
        "step": newest.name.encode(),
    }


def published(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A student's weights under the published names."""
    names = {
        "decoder.mask_token": "mask_token",
        "decoder.pos_embed": "decoder_pos_embed",
        "decoder.embed.": "decoder_embed.",
        "decoder.blocks.": "decoder_blocks.",
        "decoder.norm.": "decoder_norm.",
        "decoder.pred.": "decoder_pred.",
        "encoder.": "",
    }
    found = {}
    for name, tensor in model.state_dict().items():
        ours = next(ours for ours in names if name.startswith(ours))
        found[names[ours] + name[len(ours) :]] = tensor
    return found


def board_of(run: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(run / "tensorboard"), {"images": 0})
    board.Reload()
    return board


def log_of(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's log."""
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def same_as(alone: Path, run: Path) -> None:
    """Assert that `run` has the bits and the log of a run left alone."""
    assert weights(run) == weights(alone)
    ours, theirs = log_of(run), log_of(alone)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    assert [line["loss"] for line in ours] == [line["loss"] for line in theirs]


def pretrain_line(store: Path, out: Path, *more: object) -> list[str]:
    """The command line of a run like SMALL: two micro-batches a step, a checkpoint every second."""
    sets = [f"model.{k}={v}" for k, v in STUDENT["model_args"].items()]
    sets += [f"decoder.{k}={v}" for k, v in STUDENT["decoder"].items()]
    sets += ["log_every=1", "micro_batch=4", "save_every=2"]
    flags = {"cache": store, "out": out, "epochs": 7, "batch-size": 8, "num-workers": 0, "lr": 1e-3}
    line = [MILAN, "pretrain"]
    line += [str(part) for name, value in flags.items() for part in (f"--{name}", value)]
    return last_wins(*line, *(part for s in sets for part in ("--set", s)), *more)


FORK = multiprocessing.get_context("forkserver")
"""Processes by fork of one that has imported everything: they start in no time. Their hash seed is
another than here."""
PRELOADED = ["milan.training.pretrain", "pipeline.extract", "stages.cli", "zarr", "open_clip"]


class Environment:
    """That of this process; a process that unpickles it has the same from then on."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        change = f"import os; os.environ.clear(); os.environ.update({dict(os.environ)!r})"
        return exec, (change,)


def prepare_fork_server() -> None:
    """The one fork server of this process, started on demand, will have imported everything.

    Its forks have the environment that this process has when it asks for them.
    """
    forkserver._forkserver.set_forkserver_preload(PRELOADED)  # type: ignore[attr-defined]
    # A loader asks for less, and would get it for all that comes later.
    forkserver.set_forkserver_preload = lambda modules: None
    prepared = spawn.get_preparation_data
    spawn.get_preparation_data = lambda name: {**prepared(name), "environment": Environment()}


def forking_context(method: str | None = None, get: Any = multiprocessing.get_context) -> Any:
    """In place of multiprocessing.get_context, it lets ranks be forks."""
    return get("forkserver" if method == "spawn" else method)


def evaluate_in_small_files(protocol: str, rows: int, **arguments: Any) -> dict[str, Any]:
    """milan.evaluation.evaluate.evaluate with files of few rows; in a rank's process too."""
    from milan.evaluation import features
    from milan.evaluation.evaluate import evaluate
    from milan.evaluation.protocols import PROTOCOLS

    features.FILE_ROWS = rows
    return evaluate(PROTOCOLS[protocol], **arguments)


def alone_and_as_ranks(
    protocol: str, rows: int, folder: Path, checkpoint: Path, data: Path, /, **settings: Any
) -> dict[str, dict[str, Any]]:
    """What a protocol measures `alone` and by two `ranks`, without its seconds.

    Features are kept below `folder`, by these names, in files of `rows` rows.
    """
    from milan.core.launch import launch
    from milan.evaluation import features
    from milan.evaluation.protocols import PROTOCOLS

    got = {}
    for name in ("alone", "ranks"):
        config = PROTOCOLS[protocol].settings(
            str(checkpoint), str(data), features=str(folder / name), batch_size=8, device="cpu",
            **settings,
        )  # fmt: skip
        arguments = {"protocol": protocol, "rows": rows, "checkpoint": config}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(features, "FILE_ROWS", rows)
            got[name] = (
                evaluate_in_small_files(**arguments) if name == "alone" else launch(
                    evaluate_in_small_files, arguments, ranks=2, restarts=0,
                    restart_arguments=dict, progress=Notes(),
                )
            )  # fmt: skip
        got[name].pop("seconds")
    return got


class Forked:
    """`milan` with this command line in a forked process, whose ranks are forks as well.

    As a command of its own, but for the seconds that its imports take.
    """

    def __init__(self, line: list[str], output: Path) -> None:
        self.output, self.others = output, children_of_fork_server()
        self.process = FORK.Process(target=_forked, args=(line, str(output)))
        self.process.start()
        self.pid = self.process.pid

    def poll(self) -> int | None:
        return self.process.exitcode

    def ranks(self) -> list[int]:
        """Process ids of its ranks."""
        return [p for p in children_of_fork_server() if p not in (*self.others, self.pid)]

    def send_signal(self, number: int) -> None:
        os.kill(self.process.pid or 0, number)

    def end(self) -> tuple[int, str]:
        """(exit code, what it printed) when it is over."""
        self.process.join(120)
        assert self.process.exitcode is not None, "does not end"
        return self.process.exitcode, self.output.read_text()


def _forked(line: list[str], output: str) -> None:
    from stages import cli

    # A loader that started the fork server did so with these blocked, as its workers want them.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
    file = os.open(output, os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
    multiprocessing.get_context = forking_context
    # Its forks come of the server that it came from, not of one that imports everything again.
    forkserver._forkserver.ensure_running = lambda: None  # type: ignore[attr-defined]
    torch.set_num_threads(1)
    sys.argv = line
    cli.main()


def children_of_fork_server() -> list[int]:
    """Process ids; starts the server where there is none."""
    forkserver.ensure_running()
    pid = forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_for_step(process: Any, run: Path, step: int) -> None:
    """Until the log of a running command speaks of `step`."""
    log, end = run / "log.jsonl", time.monotonic() + 240
    while not (log.exists() and f'"step": {step},' in log.read_text()):
        assert process.poll() is None, "the run ended early"
        assert time.monotonic() < end
        time.sleep(0.002)


def until(what: Callable[[], Any], *, seconds: float = 120) -> Any:
    """Wait for a truthy answer."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        answer = what()
        if answer:
            return answer
        time.sleep(0.02)
    raise AssertionError("waited in vain")


def tagged(tag: str) -> dict[int, str]:
    """Processes that inherited `tag` from a command: pid -> its title. Reads /proc."""
    titles = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                if tag.encode() in (entry / "environ").read_bytes():
                    title = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                    state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
                    if state != "Z":
                        titles[int(entry.name)] = title
            except OSError:
                continue  # gone, or somebody else's
    return titles


def left_behind(tag: str) -> dict[int, str]:
    """What is tagged and no agent of Ray's own: killed while they start, those look for their
    head for some minutes before they give up."""
    own = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
    return {pid: title for pid, title in tagged(tag).items() if not title.startswith(own)}


class Command:
    """`milan extract-targets` running in a folder, in a session of its own."""

    def __init__(self, data: Path, cwd: Path, teacher_files: dict[str, str], *more: object) -> None:
        self.tag, self.cwd = f"MILAN_TEST_TAG={uuid.uuid4().hex}", cwd
        words = ["extract-targets", "--data", data, "--out", STORE, "--views", 2]
        words += ["--shard-size", 2, "--batch-size", 3, "--num-workers", 1, "--executor", "ray"]
        for key, value in teacher_files.items():
            words += [f"--{key}", value]
        name, value = self.tag.split("=")
        # A user who allows Ray's statistics elsewhere: milan still sends none.
        env = {**os.environ, name: value, "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "1"}
        env.pop("RAY_ADDRESS", None)
        self.process = subprocess.Popen(
            [MILAN, *last_wins(*words, *more)], cwd=cwd, env=env, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip

    def records(self) -> int:
        return len(list((self.cwd / STORE / "generations/000/records").glob("*.json")))

    def actors(self) -> list[int]:
        return [pid for pid, title in tagged(self.tag).items() if title.startswith("ray::Host")]

    def end(self) -> tuple[int, str, str]:
        """(exit code, standard output, standard error) when it is over."""
        out, err = self.process.communicate(timeout=300)
        return self.process.returncode, out, err

    def kill(self) -> None:
        """Nothing of it is left: neither itself nor what it started."""
        self.process.kill()
        self.process.communicate()
        for pid in tagged(self.tag):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def all_gone(self) -> bool:
        return not left_behind(self.tag)

    def statistics(self) -> set[str]:
        """RAY_USAGE_STATS_ENABLED as Ray's own processes have it."""
        values: set[str] = set()
        for pid, title in tagged(self.tag).items():
            if "raylet" in title or "gcs_server" in title:
                try:
                    environ = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                except OSError:
                    continue
                values |= {e.decode() for e in environ if e.startswith(b"RAY_USAGE_STATS_ENABLED=")}
        return values


def extract_here(data: Path, out: Path, files: dict[str, str], **more: Any) -> dict[str, bytes]:
    """The tree that this process makes with the teacher's `files`, what a Command would make."""
    torch.set_num_threads(1)
    settings = {"views": 2, "shard_size": 2, "batch_size": 3, "executor": "local"}
    extract_targets(str(data), out=str(out), **{**settings, **files, **more})
    return tree(out)


SCENE_COLOURS = ((60, 120, 60), (200, 60, 50), (60, 80, 200))
"""Of the classes in drawn scenes: ground, discs, boxes."""
VOID = 9
"""The number of pixels that do not count, at the edges of their shapes."""


def draw_masks(folder: Path, *, count: int = 8, seed: int = 0, split: str = "") -> Path:
    """ADE20K's folders: JPEGs of discs and boxes on grass, 60 to 120 pixels, PNGs of 3 classes."""
    from PIL import ImageDraw

    generator = np.random.default_rng(seed)
    for number in range(count):
        width, height = (int(n) for n in generator.integers(60, 121, 2))
        mask = Image.new("L", (width, height), 0)
        pen = ImageDraw.Draw(mask)
        for _ in range(4):
            kind, size = int(generator.integers(1, 3)), int(generator.integers(15, 35))
            left, top = (int(generator.integers(0, n - 15)) for n in (width, height))
            box = (left, top, left + size, top + size)
            (pen.ellipse if kind == 1 else pen.rectangle)(box, fill=kind, outline=VOID)
        ids = np.asarray(mask)
        table = np.array([*SCENE_COLOURS, *[(128, 128, 128)] * 7], np.int16)
        noise = generator.integers(-20, 21, (height, width, 3))
        picture = Image.fromarray((table[ids] + noise).clip(0, 255).astype(np.uint8))
        for what, image, ending in (("images", picture, "jpg"), ("annotations", mask, "png")):
            path = folder / what / split / f"scene {number:02d}.{ending}"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path, **({"quality": 95} if ending == "jpg" else {}))
    return folder


def in_raster(tokens: torch.Tensor, mask: Mask) -> torch.Tensor:
    """A student's prediction [B, T, C] as the published code has it: class token, then patches in
    raster order."""
    first = tokens.shape[1] - mask.order.shape[1]
    return torch.cat([tokens[:, :first], mask.in_raster(tokens[:, first:])], dim=1)
