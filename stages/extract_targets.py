"""`milan extract-targets`: run the teacher once over the images."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from milan.core.watchdog import unwatched
from pipeline.config import ExtractConfig
from stages.options import CALL, settings_command

PANELS: dict[str, tuple[str, ...]] = {
    "Data": ("data", "split", "data_root", "limit", "max_bad", "drop_missing"),
    "Views": (
        "views", "img_size", "img_width", "scale", "ratio", "hflip", "bands", "band_range", "seed"
    ),
    "Teacher": (
        "teacher", "pretrained", "teacher_norm", "teacher_layer", "texts", "targets", "captions",
        "offline",
    ),
    "Store": ("out", "codec", "store_views", "min_cosine", "shard_size", "extend", "yes"),
    "Machine": (
        "executor", "address", "replicas", "num_workers", "device", "precision", "batch_size"
    ),
}  # fmt: skip


@settings_command(ExtractConfig, PANELS, "extract")
def extract_targets(
    *,
    flags: dict[str, Any],
    params: str | None,
    sets: list[str] | None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Show the costs, as milan plan does; write nothing.",
            rich_help_panel=CALL,
        ),
    ] = False,
) -> None:
    """Run the teacher once over K views of every image and write a target cache.

    If it was killed, run the same line again: it continues where it stopped.
    """
    from milan.core.config_resolver import resolve
    from milan.core.units import format_bytes
    from pipeline.extract import extract_targets as run
    from stages import console

    config = resolve(ExtractConfig, section="extract", params=params, sets=sets, flags=flags)
    with console.ConsoleProgress() as progress:
        summary = run(config, progress=progress, dry_run=dry_run, agree=_agree)
    if dry_run:
        console.tables(summary["costs"])
        return
    rate, rejected = summary["images_per_second"], summary["bad"]
    reasons = ", ".join(f"{n} {reason}" for reason, n in rejected.items())
    rows = [
        ("store", summary["path"]),
        ("images x views", f"{summary['images']:,} x {summary['views']}"),
        ("shards", f"{summary['shards']:,}"),
        ("bytes a view", f"{summary['bytes_per_view']:,}"),
        ("bytes", format_bytes(summary["bytes"])),
        ("images/s", f"{rate:,.1f}" if rate else "nothing to do: the store is complete"),
        ("rejected files", f"{reasons} ({summary['bad_csv']})" if rejected else "none"),
        *([("dropped images", f"{summary['dropped']:,}")] if summary["dropped"] else []),
        ("cosine to the teacher", _fidelity(summary["fidelity"])),
    ]
    console.table("Extracted", ("what", ""), rows)


def _agree(costs: dict[str, list[tuple[str, str]]]) -> bool:
    """Show the costs and ask; without a terminal the answer is no."""
    from stages import console

    console.tables(costs)
    with unwatched():
        return sys.stdin.isatty() and typer.confirm("extract?")


def _fidelity(report: dict[str, Any]) -> str:
    if not report:
        return "not measured"
    means = {kind: spread["mean"] for kind, spread in report["cosine"].items()}
    return f"class {means['class']:.5f}, patches {means['patch']:.5f}"
