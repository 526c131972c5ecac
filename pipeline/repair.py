"""Repair a store: write its damaged shards again, with the same images, teacher and batches."""

from __future__ import annotations

from milan.core.paths import AnyPath, as_path
from milan.core.progress import NoProgress, Progress
from milan.errors import CacheError
from milan.images.source import ImageSource
from milan.store.format import INDEX, Entry, Index
from milan.store.generation import Generation
from pipeline.config import ExtractConfig
from pipeline.extraction.fidelity import check_canaries
from pipeline.extraction.growth import Part
from pipeline.extraction.hardware import hardware_of, plan_workers
from pipeline.extraction.plan import Plan
from pipeline.extraction.rewriting import written_again
from pipeline.extraction.run import read_codec, write_shards
from pipeline.teachers.load import load_teacher
from pipeline.teachers.spec import TeacherSpec
from pipeline.verify import Verdict, verify
from pipeline.writing.disk import as_store_error
from pipeline.writing.store import Store, Writer


def repair(
    path: str | AnyPath,
    *,
    data_root: str | None = None,
    teacher: TeacherSpec | None = None,
    device: str = "auto",
    progress: Progress | None = None,
) -> Verdict:
    """Write the damaged shards of a store again, and no others; returns the verdict afterwards.

    The images and the teacher are those that the store recorded, unless `data_root` or `teacher`
    is given. Raises CacheError if anything else than shards is damaged: then a copy is needed.
    """
    progress, where = progress or NoProgress(), as_path(path)
    if not (where / INDEX).exists():
        return verify(path, deep=True, progress=progress)  # says what is missing
    with as_store_error(where):
        store = Store(where)
        try:
            # Under the lock: what is found damaged may not be mended by another call meanwhile.
            before = verify(path, deep=True, progress=progress)
            if before.repairable:
                _rewrite_all(store, before, data_root, teacher, device, progress)
        finally:
            store.close()
    if not before.repairable:
        raise CacheError(
            f"{path} cannot be repaired: {before.corrupt[0]}",
            expected="damage inside shards or their records",
            fix="a copy of that file, or a new extraction",
        )
    return verify(path, deep=True, progress=progress) if before.shards else before


def _rewrite_all(
    store: Store,
    before: Verdict,
    data_root: str | None,
    teacher: TeacherSpec | None,
    device: str,
    progress: Progress,
) -> None:
    """Write the damaged shards of a verdict again."""
    for entry in store.entries():
        shards = [(b, v) for name, b, v in before.shards if name == entry.path]
        if shards:
            progress.note(f"{entry.path}: {len(shards)} of {entry.shards} shards are written again")
            same = _rewrite(store, entry, shards, data_root, teacher, device, progress)
            if not same:
                progress.note(
                    "their bytes differ from the lost ones (another device or library?): "
                    "runs that began with the old ones cannot continue"
                )


def _rewrite(
    store: Store,
    entry: Entry,
    shards: list[tuple[int, int]],
    root: str | None,
    teacher: TeacherSpec | None,
    device: str,
    progress: Progress,
) -> bool:
    """Write (block, view) `shards` of a finished generation; returns if the bytes are the same.

    Raises MilanError if the images at `root`, or the teacher, are not those of the store.
    """
    generation = Generation(store.path, entry)
    origin, spec = generation.origin, generation.spec
    manifest = generation.manifest()
    source = generation.find_data_root(manifest.table["path"][:16].to_pylist(), root)
    named = teacher or TeacherSpec.recorded(origin["teacher"])
    loaded = load_teacher(named.as_stored(spec.teacher, texts=bool(spec.texts)), device=device)
    if loaded.identity != spec.teacher:
        raise CacheError(
            f"teacher {loaded.about['name']} is not the one of {store.path}",
            expected="the same weights and settings",
        )
    first = next(e for e in store.entries() if e.layer == entry.layer)
    check_canaries(store.path / first.path, loaded)
    config = ExtractConfig(
        str(source), out=str(store.path), executor="local", batch_size=origin["batch_size"],
        shard_size=spec.shard_size, device=device,
    )  # fmt: skip
    others = [Generation(store.path, e) for e in store.entries() if e.layer == entry.layer]
    first_views = next(g for g in others if g.entry.rows == entry.rows and not g.spec.first_view)
    part = Part(entry.path, spec, manifest, first_views if spec.first_view else None)
    dropped = Index.read(store.path).dropped.get(entry.layer, [])
    images = ImageSource(manifest, source)
    part, todo = written_again(part, generation, images, shards, dropped)
    work = Plan(config, source, loaded, entry.layer, hardware_of(config), [part])
    writer = Writer(store, entry.path, spec)
    for block, view in todo:
        writer.forget(block, view)
    codec = read_codec(store.path / first.path, spec)
    workers = plan_workers(config, work.hardware)
    write_shards(work, writer, part, codec, writer.missing(), workers, progress)
    written = writer.finish(entry.layer)
    store.publish(written)
    return written.digest == entry.digest
