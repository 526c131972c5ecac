"""The plan, made before the first image is read: data, teacher, hardware and specs."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass, field

from milan.core.paths import AnyPath, names_in
from milan.core.progress import Progress
from milan.core.size import size_in_words
from milan.core.versions import version
from milan.errors import ConfigError, DataError
from milan.images.manifest import Manifest, build_manifest, describe_source, resolve_data
from milan.images.samples import percentiles
from milan.images.source import ImageSource
from milan.images.splits import WantedSplit
from milan.store.codecs import NO_TARGETS, codec_of
from milan.store.format import CacheSpec
from pipeline.config import ExtractConfig
from pipeline.extraction.growth import Data, Part, parts_of
from pipeline.extraction.hardware import Hardware, hardware_of
from pipeline.teachers.load import Teacher, load_teacher
from pipeline.teachers.no_teacher import PREFIX
from pipeline.teachers.spec import TeacherSpec
from pipeline.writing.backend import Location, location_of

TOKENS_ONLY = "--targets none"
_MEASURED = 64  # images, of which a range of samples is proposed
_RECORDED = ("torch", "open_clip_torch", "zarr", "numcodecs", "numpy", "pillow", "ray")


@dataclass
class Plan:
    """Everything decided before the first image is read."""

    config: ExtractConfig
    root: AnyPath
    """The folder that the manifests' paths are relative to."""
    teacher: Teacher
    layer: str
    """The store's name for the targets of this teacher and codec."""
    hardware: Hardware
    parts: list[Part]
    """The generations that the store will have of this layer, including the finished ones."""
    dropped: dict[str, list[int]] = field(default_factory=dict)
    """Of each layer: the rows whose images are gone (Index.dropped)."""
    superseded: frozenset[int] = frozenset()
    """Rejected rows of the layer whose images have a later row."""
    begun: bool = False
    """Whether it only finishes what an earlier call began, and more images are there."""

    @property
    def location(self) -> Location:
        """Where the store is, or will be."""
        return location_of(self.config.out)

    def finished_shards(self) -> list[int]:
        """How many shards of each part are committed, that is, have a record."""
        root = self.location.path
        return [sum(1 for _ in names_in(root / part.name / "records")) for part in self.parts]

    @property
    def batch_size(self) -> int:
        """Views in a forward pass of the teacher."""
        return self.config.batch_size or (256 if self.hardware.on_gpu else 64)

    def origin(self) -> dict:
        """The content of origin.json: what differs between machines, and is never compared."""
        root = self.root.resolve()
        versions = {name: version(name) for name in _RECORDED}
        versions |= {"milan": version("milan-pretrain"), "python": platform.python_version()}
        return {
            "data": self.config.data,
            "data_root": str(root),
            "data_root_from_store": self.location.relative_root(root),
            "teacher": asdict(teacher_spec(self.config, self.hardware)),
            "batch_size": self.batch_size,
            "versions": versions,
        }


def teacher_spec(config: ExtractConfig, hardware: Hardware) -> TeacherSpec:
    """The teacher that the settings name, in the precision of the devices that run it."""
    if config.targets == "none":
        name = config.teacher if config.teacher.startswith(PREFIX) else PREFIX + config.teacher
        return TeacherSpec(
            name, None, "imagenet", config.view_size, "fp32", config.offline, texts=True
        )
    return TeacherSpec(
        name=config.teacher,
        pretrained=config.pretrained,
        norm=config.teacher_norm,
        img_size=config.view_size,
        precision=hardware.precision if config.precision == "auto" else config.precision,
        offline=config.offline,
        texts=config.texts,
        block=config.teacher_layer,
    )


def _without_range(bands: tuple[int, int, int], manifest: Manifest) -> ConfigError:
    """The error for --bands without --band-range, with one measured on the first images."""
    source = ImageSource(manifest, manifest.root)
    some = map(source.read, range(min(_MEASURED, len(manifest))))
    low, high, count = percentiles(some, bands)
    return ConfigError(
        f"--bands {' '.join(map(str, bands))} without --band-range",
        expected="which samples become 0 and 255, the same for all images",
        fix=f"--band-range {low:.6g} {high:.6g} (percentiles 2 and 98 of {count} of the images)",
    )


def plan(config: ExtractConfig, progress: Progress) -> Plan:
    """Find data, load the teacher and derive the specs. Raises MilanError.

    Images are read only if a finished store has rejected them, or must be compared with its own.
    """
    config.check()
    codec = NO_TARGETS if config.targets == "none" else codec_of(config.codec)
    out = location_of(config.out).path
    source = resolve_data(config.data, config.data_root)
    manifest = build_manifest(source, seed=config.seed, split=WantedSplit(config.split))
    for line in describe_source(manifest):
        progress.note(line)
    classes = f", {len(manifest.classes)} classes" if manifest.classes else ""
    rows = min(len(manifest), config.limit or len(manifest))
    of_all = f" of {len(manifest):,}" if rows < len(manifest) else ""
    progress.note(f"manifest: {rows:,}{of_all} images{classes}")
    if config.bands and not config.band_range:
        raise _without_range(config.bands, manifest)
    images, wants = manifest.head(rows), "--texts" if config.targets == "teacher" else TOKENS_ONLY
    if config.texts or config.targets == "none":
        captions = int(images.captioned().sum())
        if not captions and not manifest.classes:
            raise DataError(
                f"{wants}, and {source} has neither captions nor class names",
                expected="a column `caption`, texts in tars, or class folders",
                fix="data with texts" if wants == TOKENS_ONLY else "without --texts",
            )
        progress.note(f"texts: {captions:,} captions, {len(manifest.classes or []):,} classes")
    hardware = hardware_of(config)
    device = hardware.driver_device(config.device)
    fetched = "" if config.offline else "; weights that are not on this machine are fetched"
    what = f"teacher {config.teacher}{fetched}"
    if config.targets == "none":
        what = f"the tokenizer of {config.teacher}; no teacher"
    progress.note(f"loading: {what}")
    teacher = load_teacher(teacher_spec(config, hardware), device=device)
    views = config.view_spec(teacher.size)
    codec.width(teacher.channels)  # raises if it cannot encode so many
    texts = teacher.texts.identity if teacher.texts else None
    if texts and config.targets == "none":
        texts = texts | {"captions": config.captions or max(1, images.most_captions())}
    wanted = CacheSpec(
        manifest="",
        rows=rows,
        views=config.views,
        tokens=teacher.tokens,
        channels=teacher.channels,
        codec=codec.name,
        shard_size=config.shard_size,
        view_law=views.law(),
        teacher=teacher.identity,
        stored_views=config.store_views,
        texts=texts,
    )
    about, identity = teacher.about, teacher.identity
    warning = ", RANDOM WEIGHTS (for tests of shape and speed only)"
    line = (
        f"teacher: {about['name']} ({about['pretrained']}), {size_in_words(teacher.size)}, "
        f"{teacher.tokens} x {teacher.channels}, {identity['precision']} on {teacher.device}, "
        f"normalisation {about['normalisation']}, licence of the weights: {about['licence']}"
        + (warning if about["random_weights"] else "")
    )
    if texts and config.targets == "none":
        line = f"targets: none; views of {size_in_words(teacher.size)}, and of each image up to "
        line += f"{texts['captions']} captions of up to {texts['context']} token ids"
    progress.note(line)
    for note in about["notes"]:
        progress.note(f"teacher: {note}")
    layer = f"{about['name']}/{codec.name}"
    data = Data(manifest, manifest.root, drop_missing=config.drop_missing)
    growth = parts_of(out, wanted, data, layer, extend=config.extend, progress=progress)
    for note in growth.notes:
        progress.note(note)
    return Plan(
        config, manifest.root, teacher, growth.layer, hardware, growth.parts, growth.dropped,
        growth.superseded, growth.begun,
    )  # fmt: skip
