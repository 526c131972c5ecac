"""`milan store`: drop parts of a finished store, or copy it."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from milan.core.watchdog import unwatched
from stages.options import Command

if TYPE_CHECKING:
    from pipeline.prune import Decision

app = typer.Typer(
    help="Drop parts of a store, or copy it.", no_args_is_help=True, rich_markup_mode=None
)


def _several(help: str, metavar: str = "<str>") -> Any:
    return typer.Option(help=f"{help}; may be repeated.", show_default=False, metavar=metavar)


@app.command(
    short_help="Drop layers, views or generations.",
    epilog="Example: milan store prune targets.zarr --unpinned --runs runs",
    cls=Command,
)
def prune(
    cache: Annotated[str, typer.Argument(help="A finished store, path or URL.")],
    layer: Annotated[
        list[str] | None, _several("Drop this layer: teacher/codec, as `milan inspect` names it")
    ] = None,
    generation: Annotated[
        list[int] | None, _several("Drop the generation of this number", "<int>")
    ] = None,
    views: Annotated[
        int | None,
        typer.Option(help="Keep this many views of each image; the last ones are dropped."),
    ] = None,
    unpinned: Annotated[
        bool, typer.Option("--unpinned", help="Drop what no run below --runs pins.")
    ] = False,
    runs: Annotated[
        list[str] | None, _several("A run's folder, or a folder of runs: what they pin stays")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Drop layers, views or generations of a store; what is left keeps its bytes.

    Shows first what would be dropped. What a run of --runs pins stays; other runs are not known.
    """
    from milan.core.units import format_bytes
    from pipeline.prune import Drop
    from pipeline.prune import prune as run
    from stages import console

    drop = Drop(layer or (), generation or (), views, unpinned)
    with console.ConsoleProgress() as progress:
        decision = run(
            cache,
            drop,
            runs=runs or (),
            agree=lambda decision: _agree(decision, bool(runs), yes),
            progress=progress,
        )
    freed = format_bytes(decision.bytes) if decision.rows else "nothing"
    console.out.print(f"dropped: {freed} of {cache}", markup=False)


def _agree(decision: Decision, runs_known: bool, yes: bool) -> bool:
    """Show what would go, and ask; without a terminal the answer is no."""
    from stages import console

    console.table("To be dropped", ("generation", "what goes"), decision.rows, text=True)
    others = "other runs" if runs_known else "runs (none was named: --runs)"
    console.out.print(
        f"not known: what {others} pin; one that needs what goes cannot go on, and says so",
        markup=False,
    )
    with unwatched():
        return yes or (sys.stdin.isatty() and typer.confirm("drop it?"))


@app.command(
    short_help="Copy a store, disk or bucket.",
    epilog="Example: milan store copy targets.zarr s3://bucket/targets.zarr",
    cls=Command,
)
def copy(
    source: Annotated[str, typer.Argument(help="A finished store, path or URL.")],
    target: Annotated[
        str, typer.Argument(help="A new folder or s3:// URL, or an earlier copy of the store.")
    ],
) -> None:
    """Copy a finished store; every checksum is compared, the index comes last.

    If it was killed, run the same line again: it continues where it stopped.
    """
    from milan.core.units import format_bytes
    from pipeline.copy_store import copy_store
    from stages import console

    with console.ConsoleProgress() as progress:
        copied = copy_store(source, target, progress=progress)
    rows = [
        ("store", copied["path"]),
        ("generations", copied["generations"]),
        ("shards", f"{copied['shards']:,}"),
        ("bytes", format_bytes(copied["bytes"])),
    ]
    console.table("Copied", ("what", ""), rows)
    console.out.print(f"every byte again: milan verify --deep {copied['path']}", markup=False)
