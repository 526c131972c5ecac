"""Commands that use a finished network or store: predict, embed, neighbours, export."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Annotated, Any

import typer

from milan.core.signals import REQUEUE
from milan.exchange.config import ExportConfig
from milan.inference.config import EmbedConfig, NeighboursConfig, PredictConfig
from stages.options import settings_command

_DATA = ("data_root", "split", "limit", "student_data")
_MACHINE = ("batch_size", "num_workers", "device")


@settings_command(
    PredictConfig,
    {
        "Data": _DATA,
        "Output": ("out", "pictures", "score"),
        "Machine": (*_MACHINE, "devices"),
    },
    "predict",
)
def predict(
    *,
    checkpoint: Annotated[
        str, typer.Argument(help="The folder of a finished training for a task, or its file.")
    ],
    folder: Annotated[str, typer.Argument(help="Images, as extract-targets takes them.")],
    flags: dict[str, Any],
    params: str | None,
    sets: list[str] | None,
) -> None:
    """Predict for all images of a folder: a table, a contact sheet.

    Images that cannot be read are counted and listed; they stop nothing.
    """
    from milan.core.config_resolver import resolve
    from milan.inference.predict import predict as run

    given = flags | {"checkpoint": checkpoint, "data": folder}
    config = resolve(PredictConfig, section="predict", params=params, sets=sets, flags=given)
    _unless_stopped(
        partial(run, config), "Predictions", "there is no table; the same line starts again"
    )


_EMBED = {
    "Encoder": ("checkpoint", "like", "model", "teacher", "pretrained", "teacher_norm"),
    "Data": ("data", *_DATA, "crop_share"),
    "Output": ("out", "pooling", "dtype", "features"),
    "Machine": (*_MACHINE, "devices"),
}


@settings_command(EmbedConfig, _EMBED, "embed")
def embed(*, flags: dict[str, Any], params: str | None, sets: list[str] | None) -> None:
    """Write the features of images to a file: class token, mean of patches, or all patches.

    Labels are not needed. If it was killed, run the same line again: it continues where it stopped.
    """
    from milan.core.config_resolver import resolve
    from pipeline.embed import embed as run

    config = resolve(EmbedConfig, section="embed", params=params, sets=sets, flags=flags)
    _unless_stopped(
        partial(run, config),
        "Embeddings",
        "features that were computed stay; the same line goes on",
    )


def _unless_stopped(run: Callable[..., dict[str, Any]], title: str, kept: str) -> None:
    """Print the figures of `run`; after a signal what is `kept`, and exit with 75."""
    from stages import console

    try:
        with console.ConsoleProgress() as progress:
            figures = run(progress=progress)
    except KeyboardInterrupt:  # the second: the first one ends it
        raise KeyboardInterrupt(kept) from None
    if "stopped_by" in figures:
        console.err.print(f"milan: stopped by {figures['stopped_by']}; {kept}", markup=False)
        raise typer.Exit(REQUEUE)
    if figures:  # else another process says it
        shown = [(name.replace("_", " "), v) for name, v in figures.items() if v is not None]
        console.table(title, ("what", ""), shown)


@settings_command(
    NeighboursConfig,
    {
        "Search": ("images", "duplicates", "threshold", "layer"),
        "Output": ("out", "data_root"),
        "Machine": ("device",),
    },
    "neighbours",
)
def neighbours(
    *,
    where: Annotated[str, typer.Argument(help="A store, or a file of milan embed.")],
    image: Annotated[
        str | None, typer.Argument(help="Its row, its key, or a file; not with --duplicates.")
    ] = None,
    flags: dict[str, Any],
    params: str | None,
    sets: list[str] | None,
) -> None:
    """Draw the images most like one, or list those that are nearly the same.

    A store needs no training: the teacher's class tokens in it are compared (of view 0).
    """
    from milan.core.config_resolver import resolve
    from milan.inference.neighbours import neighbours as run
    from stages import console

    given = flags | {"where": where, "query": image}
    config = resolve(NeighboursConfig, section="neighbours", params=params, sets=sets, flags=given)
    with console.ConsoleProgress() as progress:
        result = run(config, progress=progress)
    if config.duplicates:
        rows = [(name.replace("_", " "), value) for name, value in result.items()]
        console.table("Near-duplicates", ("what", ""), rows)
        return
    shown = [result["query"], *result["neighbours"]]
    columns = ("similarity", "row", "key", "class")
    cells = [tuple("" if row[c] is None else row[c] for c in columns) for row in shown]
    console.table("Nearest images", columns, cells, text=True)
    console.out.print(f"picture: {result['sheet']}", markup=False)


@settings_command(ExportConfig, {"Export": ("format", "out", "size")}, "export")
def export(
    *,
    checkpoint: Annotated[
        str, typer.Argument(help="The folder of a pretraining or fine-tuning, or a checkpoint.")
    ],
    flags: dict[str, Any],
    params: str | None,
    sets: list[str] | None,
) -> None:
    """Write a network as another library opens it: weights, configuration, model card.

    Mean, deviation, size, class token and pooling are written too.
    """
    from milan.core.config_resolver import resolve
    from milan.core.units import format_bytes
    from milan.exchange.export import export as run
    from stages import console

    given = flags | {"checkpoint": checkpoint}
    config = resolve(ExportConfig, section="export", params=params, sets=sets, flags=given)
    with console.ConsoleProgress() as progress:
        written = run(config, progress=progress)
    rows = [(name, format_bytes(size)) for name, size in written["files"].items()]
    title = f"{written['folder']}: {written['network']} for {written['format']}"
    console.table(title, ("file", ""), rows)
    console.out.print(written["use"], markup=False, highlight=False)
