"""Run benchmarks and keep their results: `python -m benchmarks [NAME ...]`, by default all."""

from __future__ import annotations

import argparse
import subprocess
import sys

NAMES = (
    "step", "changes", "roofline", "extraction", "waiting", "reading", "images", "random_features",
    "codecs", "planning", "bookkeeping", "large_photos", "staging", "traffic",
)  # fmt: skip

if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, epilog="names: " + ", ".join(NAMES)
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="default: all")
    names = parser.parse_args().names or NAMES
    if unknown := set(names) - set(NAMES):
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    for name in names:
        subprocess.run([sys.executable, "-m", f"benchmarks.{name}", "--keep"], check=True)
