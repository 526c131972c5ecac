"""The files of a run's folder by name, and run.json, which says what the run is.

runs/pretrain/run.json       identity, settings, parts of the store, id: written once, and added
                             to when the run moves on or drops images
    checkpoints/             milan.training.checkpoint
    log.jsonl curves.csv sheet.png tensorboard/     milan.reporting.log
    encoder.safetensors metrics.json                at the end of every call
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from milan.core.atomic import write_json
from milan.errors import TrainError

RUN = "run.json"
METRICS = "metrics.json"
LOG = "log.jsonl"
CURVES = "curves.csv"
SHEET = "sheet"
"""A picture's name: the newest is sheet.png in the run's folder."""
TENSORBOARD = "tensorboard"


def read_run(run: Path, *needed: str) -> dict[str, Any]:
    """The content of run.json, with the fields that are needed.

    Raises TrainError if it is damaged, OSError if it is gone.
    """
    try:
        content = json.loads((run / RUN).read_text())
        if not isinstance(content, dict) or not content.keys() >= {*needed}:
            raise ValueError
        return content
    except ValueError:
        raise TrainError(
            f"{run / RUN} is damaged",
            expected="the JSON that the run was begun with",
            fix="a copy of it, or --overwrite (or --resume never) to start anew",
        ) from None


def update_run(run: Path, **fields: Any) -> None:
    """Set fields of run.json."""
    write_json(run / RUN, read_run(run) | fields)
