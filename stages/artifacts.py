"""Look at what already exists: `milan visualise`, `milan report`; trains nothing."""

from __future__ import annotations

from typing import Annotated

import typer


def visualise(
    cache: Annotated[str, typer.Argument(help="A finished store.")],
    out: Annotated[str, typer.Option(help="The picture (PNG).")] = "sheet.png",
    images: Annotated[int, typer.Option(help="How many images.")] = 8,
    seed: Annotated[int, typer.Option(help="Which images, and which masks.")] = 0,
    data_root: Annotated[
        str | None, typer.Option(help="Where the images lie, if not where the store says.")
    ] = None,
) -> None:
    """Draw a sheet: image with its views as boxes, a view, attention, a mask, features."""
    from milan.visualise import contact_sheet
    from stages import console

    path = contact_sheet(cache, out=out, images=images, seed=seed, data_root=data_root)
    console.out.print(f"picture: {path}", markup=False)


def report(
    params: Annotated[str, typer.Option(help="The pipeline's parameter file.", show_default=False)],
) -> None:
    """Put a pipeline's figures together: tables (report.txt), metrics.json, and pictures."""
    from milan.report import build_report
    from stages import console

    found = build_report(params, watch=console.ConsoleWatch())
    with console.kept_in(found["folder"] + "/report.txt"):
        console.table("Linear probe", ("encoder", "top-1 %", "top-5 %"), found["probes"])
        console.table("Cost", ("what", ""), found["costs"])
        for picture in found["pictures"]:
            console.out.print(f"picture: {picture}", markup=False)
