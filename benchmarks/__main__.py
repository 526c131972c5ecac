"""Run every benchmark and keep its result: `python -m benchmarks`."""

from __future__ import annotations

import subprocess
import sys

for name in ("step", "extraction", "waiting", "reading", "images", "random_features"):
    subprocess.run([sys.executable, "-m", f"benchmarks.{name}", "--keep"], check=True)
