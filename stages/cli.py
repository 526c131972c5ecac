"""The `milan` command: registers the stages, turns errors into exit codes.

Exit codes: 0 done; 1 an error, explained in one line; 2 a usage error; 75 stopped by a signal after
saving, the same line resumes.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from functools import cache
from typing import Any, NoReturn

import typer
from typer.core import TyperGroup

from milan.core.watchdog import watched
from milan.errors import MilanError, RankError
from milan.evaluation.protocols import PROTOCOLS, find_protocol
from stages import artifacts, doctor, extract_targets, plan, pretrain, settings, store, use
from stages.evaluate import evaluation_command
from stages.options import Command, Interrupted
from stages.process import explain, prepare_process

# Set before heavy imports: no telemetry.
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["DVC_NO_ANALYTICS"] = "1"
os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # ten lines where there is no network
os.environ.setdefault("DO_NOT_TRACK", "1")
# Loader workers and decoding threads share the cores with the network's threads. Long spinning at
# an OpenMP barrier slows them down; no spinning makes a small model train half as fast.
os.environ.setdefault("GOMP_SPINCOUNT", "100000")


_OTHER_NAMES = {"visualize": "visualise", "extract": "extract-targets", "neighbors": "neighbours"}


class _Commands(TyperGroup):
    """Accepts underscores in command names, and protocols that installed packages declare."""

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        name = cmd_name.replace("_", "-")
        command = super().get_command(ctx, _OTHER_NAMES.get(name, name))
        if command is None and (protocol := find_protocol(cmd_name.replace("-", "_"))):
            alone = typer.Typer(add_completion=False, rich_markup_mode=None)
            alone.command(protocol.command, cls=Command)(evaluation_command(protocol))
            command = typer.main.get_command(alone)
        return command


app = typer.Typer(
    name="milan",
    cls=_Commands,
    help="Pretrain vision transformers on cached CLIP targets.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
_COMMANDS: tuple[tuple[Callable[..., None], str, str], ...] = (
    (
        doctor.doctor,
        "Check whether everything will work here.",
        "doctor --data imagenet --out targets.zarr",
    ),
    (plan.plan, "Estimate the cost of an extraction.", "plan --data imagenet --budget 2TB"),
    (
        extract_targets.extract_targets,
        "Run the teacher once; write a store.",
        "extract-targets --data imagenet --out targets.zarr",
    ),
    (
        pretrain.pretrain,
        "Train a student from a store.",
        "pretrain --cache targets.zarr --epochs 100 --set model.drop_path_rate=0.1",
    ),
    *(
        (evaluation_command(p), p.help, f"{p.command} --checkpoint runs/pretrain {p.data_example}")
        for p in PROTOCOLS.values()
    ),
    (
        use.predict,
        "Predict for the images of a folder.",
        "predict runs/pretrain/finetune photos --out predictions.csv",
    ),
    (
        use.embed,
        "Write features of images to a file.",
        "embed --checkpoint runs/pretrain --data imagenet --out embeddings.parquet",
    ),
    (
        use.neighbours,
        "Find the images nearest to one, or near-duplicates.",
        "neighbours targets.zarr 17 --out neighbours.png",
    ),
    (
        use.export,
        "Write a network for timm, transformers, ONNX, ...",
        "export runs/pretrain --format timm --out my-encoder",
    ),
    (artifacts.inspect, "Describe a store.", "inspect targets.zarr"),
    (artifacts.verify, "Check a store.", "verify targets.zarr --deep --audit 100"),
    (artifacts.repair, "Rewrite the damaged shards of a store.", "repair targets.zarr"),
    (
        artifacts.visualise,
        "Draw images, crops, attention, masks, features.",
        "visualise targets.zarr --out sheet.png",
    ),
    (
        artifacts.report,
        "Compare runs on one page.",
        "report runs/a runs/b targets.zarr --out report.html",
    ),
    (
        settings.config,
        "List the settings of a command, with units and sources.",
        "config pretrain --set epochs=100",
    ),
)
for _command, _help, _example in _COMMANDS:
    app.command(
        _example.split()[0], short_help=_help, epilog=f"Example: milan {_example}", cls=Command
    )(_command)  # fmt: skip
app.add_typer(store.app, name="store")


@app.callback(invoke_without_command=True)
def _main(version: bool = typer.Option(False, "--version", help="Print the version.")) -> None:
    if version:
        from milan.version import __version__

        typer.echo(f"milan-pretrain {__version__}")
        raise typer.Exit


@cache
def _group() -> Any:
    """The commands with their options, read off signatures once for all calls in a process."""
    return typer.main.get_command(app)


def main() -> None:
    """Run the command line; a MilanError becomes one line on stderr and exit code 1."""
    previous, threading.excepthook = threading.excepthook, _thread_excepthook
    try:
        prepare_process()
        with watched():
            _group()(prog_name="milan")
    except (MilanError, RankError) as error:
        _fail(str(error))
    except OSError as error:  # a full disk, a share that is gone: not a bug
        _fail(explain(error))
    except Interrupted as interrupted:
        print(f"milan: interrupted: {interrupted}", file=sys.stderr)
        raise SystemExit(130) from None
    finally:
        threading.excepthook = previous


def _thread_excepthook(args: threading.ExceptHookArgs) -> None:
    # TensorBoard's writer thread raises its OSError (a full disk) in the main thread as well.
    if not isinstance(args.exc_value, OSError):
        threading.__excepthook__(args)


def _fail(text: str) -> NoReturn:
    sys.stdout.flush()
    print("milan:", " ".join(text.splitlines()), file=sys.stderr)
    raise SystemExit(1) from None


if __name__ == "__main__":
    main()
