"""What a store has not, though this version writes it: told, and no fault.

A store of an earlier version keeps what it was made with: nothing committed is rewritten. Damage is
another matter, and found by `milan verify`.
"""

from __future__ import annotations

from dataclasses import fields

from milan.core.paths import AnyPath
from milan.errors import CacheError
from milan.store.format import FIDELITY, ORIGIN, CacheSpec, Index
from milan.store.generation import Generation

# What follows from it; of anything else its name says enough.
_SO = {
    "origin.json": "where it was made is not known: --data-root and --teacher have to say",
    "canaries": "a teacher whose outputs have moved is not noticed when it grows",
    "fidelity report": "how near its codec is to the teacher is not known",
    "texts in its spec": "it was made before there were any, and is read as without",
    "stored_views in its spec": "it was made before there were any, and is read as without",
    "ends in its records": "its stored views cannot be told apart",
}


def missing_features(store: AnyPath) -> list[tuple[str, str]]:
    """(what, what follows and where) of each thing that a finished store lacks."""
    found: dict[tuple[str, str], list[str]] = {}
    layers: set[str] = set()
    for entry in Index.read(store).generations:
        generation = Generation(store, entry)
        maker = _maker(generation)
        for what in _lacks(generation, first=entry.layer not in layers):
            found.setdefault((what, maker), []).append(entry.path)
        layers.add(entry.layer)
    return [
        (f"no {what}", (f"{_SO[what]}; " if what in _SO else "") + f"{', '.join(paths)}, {maker}")
        for (what, maker), paths in found.items()
    ]


def _lacks(generation: Generation, *, first: bool) -> list[str]:
    """What one generation lacks; the `first` of a layer has more."""
    files, spec = generation.entry.files, generation.attributes["spec"]
    what = [] if (generation.root / ORIGIN).exists() else ["origin.json"]
    if first and not any(name.startswith("canary/") for name in files):
        what.append("canaries")
    if FIDELITY not in files:
        what.append("fidelity report")
    what += [f"{field.name} in its spec" for field in fields(CacheSpec) if field.name not in spec]
    # What reading can do without; of the rest a record without it is damaged.
    expected = ["heights", "widths"] + ["ends"] * (generation.spec.stored_views != "none")
    try:
        record = generation.record(0, 0)
    except CacheError:
        return what  # damage, which is for verify to tell
    return what + [f"{key} in its records" for key in expected if key not in record]


def _maker(generation: Generation) -> str:
    try:
        return f"made by milan {generation.origin['versions']['milan']}"
    except (CacheError, KeyError):
        return "made by an unknown version"
