"""What is decided before the first image is read: data, teacher, specs, and who does the work."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

from milan.core.paths import AnyPath
from milan.core.progress import Progress
from milan.errors import ConfigError, DataError
from milan.images.manifest import build_manifest, data_root, resolve_data
from milan.images.views import ViewSpec
from milan.store.codecs import codec_of
from milan.store.format import CacheSpec
from pipeline.config import ExtractConfig
from pipeline.extraction.growth import Part, parts_of
from pipeline.teachers.load import Teacher, TeacherSpec, load_teacher
from pipeline.writing.store import writable

_RECORDED = ("torch", "open_clip_torch", "zarr", "numcodecs", "numpy", "pillow", "ray")


Workers = tuple[int, int, int | None]
"""(replicas, decoding threads each, torch threads each; None: as they are)"""


@dataclass
class Plan:
    """Everything decided before the first image is read."""

    config: ExtractConfig
    source: AnyPath
    teacher: Teacher
    layer: str
    """What the store calls the targets of this teacher and codec."""
    parts: list[Part]
    """The generations that the store will have of this layer, the finished ones included."""

    def origin(self) -> dict:
        """What differs between machines: told, not compared."""
        root = data_root(self.source).resolve()
        versions = {name: version(name) for name in _RECORDED}
        versions |= {"milan": version("milan-pretrain"), "python": platform.python_version()}
        out = writable(self.config.out)
        return {
            "data": self.config.data,
            "data_root": str(root),
            # A URL is where it is, wherever the store goes, and no disk is beside a bucket.
            "data_root_from_store": os.path.relpath(root, out.resolve())
            if isinstance(root, Path) and isinstance(out, Path)
            else None,
            "teacher": asdict(teacher_spec(self.config)),
            "batch_size": self.config.batch_size,
            "versions": versions,
        }


def teacher_spec(config: ExtractConfig) -> TeacherSpec:
    """The teacher that the settings name."""
    return TeacherSpec(
        name=config.teacher,
        pretrained=config.pretrained,
        norm=config.teacher_norm,
        img_size=config.img_size,
        precision=config.precision,
        offline=config.offline,
        texts=config.texts,
    )


def plan(config: ExtractConfig, progress: Progress) -> Plan:
    """Resolve data and teacher and fix the specs; reads no image. Raises MilanError."""
    config.check()
    codec_of(config.codec)
    out = writable(config.out)
    source = resolve_data(config.data, config.data_root)
    progress.note(f"data: {source.resolve()}")
    manifest = build_manifest(source, seed=config.seed)
    classes = f", {len(manifest.classes)} classes" if manifest.classes else ""
    some = f" of {len(manifest):,}" if config.limit and config.limit < len(manifest) else ""
    rows = min(len(manifest), config.limit or len(manifest))
    progress.note(f"manifest: {rows:,}{some} images{classes}")
    if manifest.ignored:
        kinds = ", ".join(f"{n:,} {ext}" for ext, n in sorted(manifest.ignored.items()))
        progress.note(f"no images, left out: {kinds}")
    if config.texts:
        told = int(manifest.head(rows).captioned().sum())
        if not told and not manifest.classes:
            raise DataError(
                f"--texts, and {source} has neither captions nor class names",
                expected="a column `caption`, texts in tars, or class folders",
                fix="without --texts",
            )
        progress.note(f"texts: {told:,} captions, {len(manifest.classes or []):,} classes")
    teacher = load_teacher(teacher_spec(config), device=config.device)
    law = ViewSpec(teacher.size, config.scale, config.ratio, config.hflip, config.seed).law()
    codec = codec_of(config.codec)
    codec.width(teacher.channels)
    wanted = CacheSpec(
        manifest="",
        rows=rows,
        views=config.views,
        tokens=teacher.tokens,
        channels=teacher.channels,
        codec=codec.name,
        shard_size=config.shard_size,
        view_law=law,
        teacher=teacher.identity,
        stored_views=config.store_views,
        texts=teacher.texts.identity if teacher.texts else None,
    )
    about, identity = teacher.about, teacher.identity
    random = ", RANDOM WEIGHTS (for tests of shape and speed only)"
    progress.note(
        f"teacher: {about['name']} ({about['pretrained']}), {teacher.size} px, "
        f"{teacher.tokens} x {teacher.channels}, {identity['precision']} on {teacher.device}, "
        f"normalisation {about['normalisation']}, licence of the weights: {about['licence']}"
        + (random if about["random_weights"] else "")
    )
    for note in about["notes"]:
        progress.note(f"teacher: {note}")
    layer = f"{about['name']}/{codec.name}"
    layer, parts = parts_of(out, wanted, manifest, layer, extend=config.extend)
    return Plan(config, source, teacher, layer, parts)


def share(config: ExtractConfig, work: Plan) -> Workers:
    """(replicas, decoding threads each, torch threads each) on the machine or cluster at hand."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cores = cores or 1
    on_gpu = work.teacher.device.type == "cuda"
    if config.executor == "local":
        if config.replicas not in (None, 1):
            raise ConfigError(
                f"--replicas {config.replicas} with --executor local", fix="--executor ray"
            )
        replicas = 1
    elif config.replicas:
        replicas = config.replicas
    elif config.address or os.environ.get("RAY_ADDRESS"):
        from pipeline.cluster.connect import cluster_gpus

        replicas = max(1, cluster_gpus(config.address))
    else:
        replicas = torch.cuda.device_count() if on_gpu else 1
    threads = config.num_workers or max(1, min(16, cores // replicas))
    # In this process the user's setting holds; Ray would give a worker one thread.
    here = on_gpu or config.executor == "local"
    return replicas, threads, None if here else max(1, torch.get_num_threads() // replicas)
