"""The `milan` command: registers the stages, turns errors into exit codes.

Exit codes: 0 done; 1 an error that one line explains; 2 a command line that cannot be understood;
75 asked to stop, and able to go on.
"""

from __future__ import annotations

import os
import sys
import threading
from typing import NoReturn

import typer

from milan.errors import MilanError
from stages import artifacts, extract_targets, plan, pretrain, transfer

# Before anything heavy is imported: milan sends nothing anywhere.
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["DVC_NO_ANALYTICS"] = "1"
os.environ.setdefault("DO_NOT_TRACK", "1")
# Loader workers and decoding threads share the cores with the network's threads. Spinning at a
# barrier for long keeps them from work; not at all makes a small model train half as fast.
os.environ.setdefault("GOMP_SPINCOUNT", "100000")

app = typer.Typer(
    name="milan",
    help="Pretrain vision transformers on cached CLIP targets.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for _name, _command, _help in (
    ("plan", plan.plan, "Say what an extraction will take."),
    ("extract-targets", extract_targets.extract_targets, "Run the teacher once; write a store."),
    ("pretrain", pretrain.pretrain, "Train a student from a store."),
    ("linear-probe", transfer.linear_probe, "Measure an encoder on labelled images."),
    ("inspect", artifacts.inspect, "Say what a store holds."),
    ("verify", artifacts.verify, "Check a store."),
    ("repair", artifacts.repair, "Make the damaged shards of a store again."),
    ("visualise", artifacts.visualise, "Draw images, views, attention, masks, features."),
    ("report", artifacts.report, "Put a pipeline's figures and pictures together."),
):
    app.command(_name, short_help=_help)(_command)


@app.callback(invoke_without_command=True)
def _main(version: bool = typer.Option(False, "--version", help="Print the version.")) -> None:
    if version:
        from milan.version import __version__

        typer.echo(f"milan-pretrain {__version__}")
        raise typer.Exit


def main() -> None:
    """Run the command line; a MilanError becomes one line on stderr and exit code 1."""
    before, threading.excepthook = threading.excepthook, _of_thread
    try:
        app()
    except MilanError as error:
        _fail(str(error))
    except OSError as error:  # a disk that is full, a share that is gone: no fault of the code
        _fail(str(error))
    except KeyboardInterrupt:
        print("milan: interrupted; run the same line again to go on", file=sys.stderr)
        raise SystemExit(130) from None
    finally:
        threading.excepthook = before


def _of_thread(failed: threading.ExceptHookArgs) -> None:
    # TensorBoard writes in a thread, and raises what a full disk does there once more in ours.
    if not isinstance(failed.exc_value, OSError):
        threading.__excepthook__(failed)


def _fail(text: str) -> NoReturn:
    sys.stdout.flush()
    print("milan:", " ".join(text.splitlines()), file=sys.stderr)
    raise SystemExit(1) from None


if __name__ == "__main__":
    main()
