"""What a store is, in words and numbers: for `milan inspect`."""

from __future__ import annotations

from typing import Any

from milan.core.paths import AnyPath, as_path, size_of
from milan.core.size import size_in_words
from milan.core.units import format_bytes
from milan.errors import CacheError, DataError
from milan.store.cache import TargetCache
from milan.store.format import Index
from milan.store.similarity import similarities


def describe(path: str | AnyPath) -> dict[str, list[tuple[str, Any]]]:
    """Tables by title, rows of (what, value). Raises CacheError if the store cannot be opened."""
    index = Index.read(as_path(path))
    layers = dict.fromkeys(entry.layer for entry in index.generations)
    tables = {}
    for layer in layers:
        cache = TargetCache(path, layer=layer)
        tables[layer] = [*_what(cache), *_size(cache)]
        fidelity = _fidelity(cache)
        if fidelity:
            tables[f"{layer}: fidelity to the teacher"] = fidelity
    tables["generations"] = [
        (
            entry.path,
            f"{entry.layer}, rows {entry.rows[0]:,} to {entry.rows[1]:,}, views {entry.views[0]} "
            f"to {entry.views[1]}, {entry.shards:,} shards, {entry.bad} bad, {entry.digest[:12]}",
        )
        for entry in index.generations
    ]
    return tables


def _what(cache: TargetCache) -> list[tuple[str, Any]]:
    about, spec, superseded = cache.attributes["about"], cache.spec, len(cache.superseded)
    views = cache.view_spec
    weights = "RANDOM WEIGHTS" if about["random_weights"] else about["pretrained"]
    teacher = [
        ("teacher", f"{about['name']} ({weights}), {spec.teacher['precision']}"),
        ("licence of the weights", about["licence"]),
        ("normalisation", about["normalisation"]),
        ("targets", f"{spec.tokens} tokens x {spec.channels} channels, {spec.codec}"),
    ]
    return [
        *(teacher if spec.has_targets else [("targets", "none: views and token ids")]),
        *_texts(cache),
        *_similarities(cache),
        ("data", _data(cache)),
        (
            "images",
            f"{cache.images:,}, {len(cache.bad) - superseded:,} of them without targets"
            + (f", {len(cache.dropped):,} dropped (deleted)" if len(cache.dropped) else ""),
        ),
        ("views of each", cache.views),
        (
            "view",
            f"{size_in_words(views.size)}, area {views.scale[0]:g} to {views.scale[1]:g}, "
            f"width / height {views.ratio[0]:.3g} to {views.ratio[1]:.3g}, "
            f"mirrored {views.hflip:.0%}, seed {views.seed}"
            + (
                f"; RGB are channels {views.bands}, {views.band_range} become (0, 255)"
                if views.bands
                else ""
            ),
        ),
        ("identity", cache.digest),
    ]


def _data(cache: TargetCache) -> str:
    try:
        return cache.generations[0].origin["data"]
    except CacheError:  # origin.json names folders, and may be left out of a published store
        return "not known"


def _texts(cache: TargetCache) -> list[tuple[str, Any]]:
    if not cache.spec.texts:
        return []
    prototypes, most = cache.prototypes, cache.spec.texts.get("captions", 1)
    summary = f"{len(cache.captioned):,} captions"
    if most > 1:
        summary = f"of {len(cache.captioned):,} images up to {most} captions each"
    summary += f" of at most {cache.spec.texts['context']} ids"
    if prototypes:
        classes, templates = prototypes.ids.shape[:2]
        summary += f", {classes:,} classes in {templates} templates"
    return [("texts", summary)]


def _similarities(cache: TargetCache) -> list[tuple[str, Any]]:
    if not cache.spec.texts or not cache.spec.has_targets:
        return []
    try:
        measured = similarities(cache)
    except (CacheError, DataError) as error:
        return [("cosines to texts", f"cannot be read: {error.found}")]
    tau = measured.teacher_tau
    spreads = ", ".join(f"{measured.effective(t):,.1f} at {t:g}" for t in (0.04, tau))
    return [
        (
            "cosines to texts",
            f"patches {measured.mean:.3f} ± {measured.spread:.3f}, class token "
            f"{measured.class_mean:.3f} ± {measured.class_spread:.3f}, "
            f"over {measured.texts:,} texts",
        ),
        ("texts that a patch spreads over", f"{spreads} (temperature of the softmax)"),
    ]


def _size(cache: TargetCache) -> list[tuple[str, Any]]:
    shards = sum(g.entry.bytes for g in cache.generations)
    small = sum(size_of(g.root / name) or 0 for g in cache.generations for name in g.entry.files)
    count = sum(g.entry.shards for g in cache.generations)
    return [
        ("bytes a view", f"{cache.spec.view_bytes():,}"),
        ("shards", f"{count:,}, {format_bytes(shards)}"),
        ("manifest, tables, canaries", format_bytes(small)),
    ]


def _fidelity(cache: TargetCache) -> list[tuple[str, Any]]:
    report = cache.generations[0].fidelity
    if not report:
        return []
    rows: list[tuple[str, Any]] = [("measured on", f"{report['images']} images held back")]
    for kind, spread in report["cosine"].items():
        cosine = f"mean {spread['mean']:.6f}, 1st percentile {spread['p01']:.6f}"
        rows.append((f"cosine, {kind} tokens", f"{cosine}, worst {spread['worst']:.6f}"))
    return [
        *rows,
        ("loss floor 2 (1 - cos)", f"{report['loss_floor']:.2e}"),
        ("attention, rank agreement", f"{report['attention_rank']:.6f}"),
        ("masks, visible patches shared", f"{report['mask_overlap']:.2%}"),
    ]
