"""`milan doctor`: will an extraction and a pretraining work here."""

from __future__ import annotations

from typing import Any

import typer

from pipeline.config import DoctorConfig
from stages.extract_targets import PANELS
from stages.options import settings_command


@settings_command(DoctorConfig, PANELS, "extract")
def doctor(*, flags: dict[str, Any], params: str | None, sets: list[str] | None) -> None:
    """Look at machine, disk or bucket, teacher, data and cluster, in some seconds.

    Leaves nothing behind. Exit code 1 if something will not work.
    """
    from milan.core.config_resolver import resolve
    from pipeline.doctor import FAILS, diagnose
    from stages import console

    config = resolve(DoctorConfig, section="extract", params=params, sets=sets, flags=flags)
    config.check()
    with console.ConsoleProgress() as progress:
        findings = diagnose(config, progress=progress)
    rows = [(f.what, f.state, f.found, f.remedy) for f in findings]
    console.table("Doctor", ("what", "", "found", "try"), rows, text=True)
    failed = sum(finding.state == FAILS for finding in findings)
    if failed:
        console.err.print(f"milan: {failed} of {len(findings)} findings fail", markup=False)
        raise typer.Exit(1)
