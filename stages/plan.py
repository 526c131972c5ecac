"""`milan plan`: what an extraction takes, before it is run."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from pipeline.config import ExtractConfig
from stages.extract_targets import FLAGS
from stages.options import settings_command


@settings_command(ExtractConfig, FLAGS)
def plan(
    *,
    flags: dict[str, Any],
    params: str | None,
    sets: list[str] | None,
    budget: Annotated[
        str | None,
        typer.Option(help="Propose what fits, such as 2TB: views, codec, stored views."),
    ] = None,
    images_per_second: Annotated[
        float | None,
        typer.Option(help="Of one replica, all views of each image; measured otherwise."),
    ] = None,
    write_mb_per_second: Annotated[
        float | None, typer.Option(help="What the store's disk takes; measured otherwise.")
    ] = None,
    train_images_per_second: Annotated[
        float | None, typer.Option(help="Speed of training; 6,000 is assumed otherwise.")
    ] = None,
) -> None:
    """Say what an extraction takes: bytes, files, hours, bandwidth, and when it has paid.

    Takes the flags that say what a new store holds, as extract-targets does; measures for some
    seconds, and writes nothing that stays.
    """
    from milan.core.config_resolver import resolve
    from pipeline.estimate.cost import estimate_cost
    from stages import console

    config = resolve(ExtractConfig, section="extract", params=params, sets=sets, flags=flags)
    found = estimate_cost(
        config,
        budget=budget,
        images_per_second=images_per_second,
        write_mb_per_second=write_mb_per_second,
        train_images_per_second=train_images_per_second,
        progress=console.ConsoleProgress(),
    )
    console.tables(found)
