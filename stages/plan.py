"""`milan plan`: the cost of an extraction, before it is run."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from pipeline.config import ExtractConfig
from stages.extract_targets import PANELS
from stages.options import CALL, settings_command


@settings_command(
    ExtractConfig,
    {
        panel: tuple(n for n in names if n not in ("extend", "drop_missing", "yes"))
        for panel, names in PANELS.items()
    },
    "extract",
)
def plan(
    *,
    flags: dict[str, Any],
    params: str | None,
    sets: list[str] | None,
    budget: Annotated[
        str | None,
        typer.Option(
            help="Propose views, codec and stored views that fit this size, such as 2TB.",
            rich_help_panel=CALL,
        ),
    ] = None,
    images_per_second: Annotated[
        float | None,
        typer.Option(
            help="Images/s of one replica, with all views of an image; default: measured.",
            rich_help_panel=CALL,
        ),
    ] = None,
    accelerator: Annotated[
        str | None,
        typer.Option(
            help="This card's published rate for the teacher (a100, rtx4090, ...); all else is "
            "measured.",
            rich_help_panel=CALL,
        ),
    ] = None,
    write_mb_per_second: Annotated[
        float | None,
        typer.Option(help="Speed of the store's disk; default: measured.", rich_help_panel=CALL),
    ] = None,
    train_images_per_second: Annotated[
        float | None,
        typer.Option(
            help="Speed of training; default: 6,000, an assumption.", rich_help_panel=CALL
        ),
    ] = None,
) -> None:
    """Estimate an extraction: bytes, files, hours, bandwidth, and its break-even.

    Takes the flags of extract-targets for a new store; measures for some seconds, and leaves no
    file.
    """
    from milan.core.config_resolver import resolve
    from pipeline.estimate.cost import estimate_cost
    from stages import console

    config = resolve(ExtractConfig, section="extract", params=params, sets=sets, flags=flags)
    tables = estimate_cost(
        config,
        budget=budget,
        images_per_second=images_per_second,
        accelerator=accelerator,
        write_mb_per_second=write_mb_per_second,
        train_images_per_second=train_images_per_second,
        progress=console.ConsoleProgress(),
    )
    console.tables(tables)
