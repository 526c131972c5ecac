"""`milan pretrain`: train a student from a cache."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from milan.config import PretrainConfig
from milan.core.signals import REQUEUE
from stages.options import CALL, settings_command

_RATES = (
    ("images/s", "images_per_second", "{:,.1f}"),
    ("data-loading time", "wait_share", "{:.1%}"),
    ("time for checkpoints", "checkpoint_share", "{:.1%}"),
)


PANELS: dict[str, tuple[str, ...]] = {
    "Store and run": (
        "cache", "layer", "mask_layer", "data_root", "out", "on_changed", "on_growth"
    ),
    "Student": ("recipe", "model", "init", "student_channels", "student_data"),
    "Objective": (
        "objective", "masking", "loss", "target_norm", "predict", "class_weight",
        "deep_supervision", "gather", "text_tower",
    ),
    "Schedule": ("epochs", "batch_size", "lr", "warmup_epochs", "seed", "shuffle", "on_nonfinite"),
    "Validation and reports": ("held_out", "probe_every", "report_to"),
    "Machine": (
        "device", "precision", "devices", "num_nodes", "address", "parallel", "num_workers",
        "local", "cache_limit",
    ),
}  # fmt: skip


@settings_command(PretrainConfig, PANELS, "pretrain")
def pretrain(
    *,
    flags: dict[str, Any],
    params: str | None,
    sets: list[str] | None,
    resume: Annotated[
        str,
        typer.Option(
            help="auto: continue from the newest checkpoint; never: start anew.",
            rich_help_panel=CALL,
        ),
    ] = "auto",
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Replace a run of other settings.", rich_help_panel=CALL),
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Estimate time and memory of the run; write nothing.",
            rich_help_panel=CALL,
        ),
    ] = False,
    max_steps: Annotated[
        int | None,
        typer.Option(
            help="Write a checkpoint and end this call after this many steps.", rich_help_panel=CALL
        ),
    ] = None,
) -> None:
    """Train a student on a target cache; the teacher never runs.

    Leaves encoder.safetensors, which timm loads. Killed at any moment, the same line goes on.
    """
    from milan.core.config_resolver import resolve
    from stages import console

    config = resolve(PretrainConfig, section="pretrain", params=params, sets=sets, flags=flags)
    if dry_run:
        from milan.training.estimate import estimate_run
        from milan.training.pretrain import Call

        with console.ConsoleProgress() as progress:
            call = Call(resume, overwrite, max_steps)
            rows = estimate_run(config, call=call, progress=progress)
        console.table("A run would take", ("what", ""), rows)
        return
    from milan.training.pretrain import pretrain as run

    try:
        with console.ConsoleProgress() as progress:
            figures = run(
                config, resume=resume, overwrite=overwrite, stop_after=max_steps, progress=progress
            )
    except KeyboardInterrupt:  # the second: the first one ends a run with a checkpoint
        raise KeyboardInterrupt(
            f"the checkpoints in {config.out} stay; the same line goes on from the last one"
        ) from None
    if figures["rank"]:
        return  # another process says it
    rows = [
        ("run", figures["run"]),
        ("step", f"{figures['step']:,} of {figures['steps']:,}"),
        *_metrics(figures),
        *((name, show.format(figures[key])) for name, key, show in _RATES if key in figures),
        ("encoder", figures["run"] + "/encoder.safetensors"),
    ]
    if figures["step"]:
        console.table("Pretrained", ("what", ""), rows)
    if "stopped_by" in figures:
        left = f" at step {figures['step']}, checkpoint written" if figures["step"] else ""
        console.err.print(
            f"milan: stopped by {figures['stopped_by']}{left}; the same line goes on",
            markup=False,
        )
        raise typer.Exit(REQUEUE)


def _metrics(figures: dict[str, Any]) -> list[tuple[str, str]]:
    """The last loss, and the validation metrics that the objective has."""
    rows = [("loss", f"{figures['loss']:.4f}")] if "loss" in figures else []
    for name, value in figures.items():
        if name.startswith("val_"):
            rows.append(
                (f"validation {name.removeprefix('val_').replace('_', ' ')}", f"{value:.4f}")
            )
    if "knn_top1" in figures:
        rows.append(("k-NN top-1 %", f"{figures['knn_top1']:.2f}"))
    return rows
