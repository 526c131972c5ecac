"""Run every benchmark and keep its result: `python -m benchmarks`."""

from __future__ import annotations

import subprocess
import sys

NAMES = (
    "step", "changes", "roofline", "extraction", "waiting", "reading", "images", "random_features",
    "codecs", "planning", "bookkeeping", "large_photos",
)  # fmt: skip
for name in NAMES:
    subprocess.run([sys.executable, "-m", f"benchmarks.{name}", "--keep"], check=True)
