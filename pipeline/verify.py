"""Check a store: every checksum, from the index down.

index -> small files of each generation, by SHA-256
      -> shard table -> records, by SHA-256 -> files, by size; shard indexes, by crc32c
deep: -> files, by SHA-256; every chunk and row, by crc32c; attention positive and finite
audit:   run the teacher again, on random views that are rendered as training renders them
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import google_crc32c
import numpy as np
import torch

from milan.core.ahead import Ahead
from milan.core.config_fields import check_seed
from milan.core.paths import AnyPath, as_path, folders_in, pieces_of, read_file
from milan.core.progress import NoProgress, Progress
from milan.core.transfer import through_device
from milan.data.dataset import CachedDataset
from milan.errors import CacheError, DataError, MachineError, TeacherError
from milan.images.views import checksum, unpack
from milan.store.cache import TargetCache
from milan.store.format import (
    CONTENT,
    GENERATIONS,
    INDEX,
    TEXT_IDS,
    ArraySpec,
    Entry,
    Index,
    canonical,
    record_name,
)
from milan.store.generation import Generation
from milan.store.texts import read_texts
from pipeline.extraction.worker import same_teacher
from pipeline.teachers.load import Teacher, load_teacher
from pipeline.teachers.spec import TeacherSpec

GOOD, CORRUPT, INCOMPLETE, FOREIGN = 0, 3, 4, 5
_BATCH = 64  # rows decoded at once
_MIN_TEXT_COSINE = 0.999  # between the features of one text by two kernels or libraries


@dataclass(frozen=True)
class Audit:
    """A check of random views by the teacher."""

    views: int
    """How many."""
    seed: int = 0
    """Of their choice."""
    data_root: str | None = None
    """Where the images are; default: where the store recorded them."""
    teacher: TeacherSpec | None = None
    """Default: the one that the store recorded."""
    device: str = "auto"

    def __post_init__(self) -> None:
        """Raises ConfigError for a seed out of its range."""
        check_seed(self.seed)


@dataclass
class Verdict:
    """The result of a check; `code` is the exit code of `milan verify`."""

    path: str
    corrupt: list[str] = field(default_factory=list)
    """A line for each damaged part, with its name."""
    incomplete: list[str] = field(default_factory=list)
    """A line for each part that is not written yet."""
    foreign: list[str] = field(default_factory=list)
    """A line for each part of another teacher or data set."""
    shards: list[tuple[str, int, int]] = field(default_factory=list)
    """(generation, block, view) of the damaged shards; `milan repair` writes them again."""
    repairable: bool = True
    """Whether only shards are damaged."""
    checked: dict[str, int] = field(default_factory=dict)
    """How many of each kind of thing were checked."""
    unread: int = 0
    """Bytes of targets whose contents were not read: only their sizes and shard indexes were."""

    @property
    def code(self) -> int:
        """0 good, 3 corrupt, 4 incomplete, 5 another teacher or data set."""
        if self.corrupt:
            return CORRUPT
        if self.incomplete:
            return INCOMPLETE
        return FOREIGN if self.foreign else GOOD

    def add_damage(self, line: str) -> None:
        """Add damage that writing shards again does not repair."""
        self.corrupt.append(line)
        self.repairable = False

    def count(self, kind: str, number: int = 1) -> None:
        """Add to `checked`."""
        self.checked[kind] = self.checked.get(kind, 0) + number


def verify(
    path: str | AnyPath,
    *,
    deep: bool = False,
    audit: Audit | None = None,
    progress: Progress | None = None,
) -> Verdict:
    """Check a store. Reads records and shard indexes; with `deep` every byte.

    Damage raises no error, it is in the verdict. Raises DataError if a server does not answer, and
    CacheError for an audit of a store without targets.
    """
    progress = progress or NoProgress()
    store = as_path(path)
    verdict = Verdict(str(path))
    try:
        index = Index.read(store)
    except CacheError as error:
        if (store / INDEX).exists():
            verdict.add_damage(str(error))
        else:
            verdict.incomplete.append(str(error))
        return verdict
    verdict.unread = 0 if deep else sum(entry.bytes for entry in index.generations)
    progress.begin("verify", sum(entry.shards for entry in index.generations), "shards")
    for entry in index.generations:
        _check_generation(store, entry, verdict, deep, progress)
    progress.end()
    if not verdict.corrupt:
        for layer in dict.fromkeys(entry.layer for entry in index.generations):
            try:
                cache = TargetCache(store, layer=layer)
                verdict.count("images x views", cache.rows * cache.views)
            except CacheError as error:
                verdict.add_damage(str(error))
    listed = {entry.path for entry in index.generations} | {*index.pruned}
    for name in sorted(folders_in(store / GENERATIONS)):
        if name[:1].isdecimal() and f"{GENERATIONS}/{name}" not in listed:
            verdict.incomplete.append(f"{GENERATIONS}/{name} is begun and not in the index")
    if audit and not verdict.corrupt:
        _audit_views(TargetCache(store), verdict, audit, progress)
    return verdict


def _check_generation(
    store: AnyPath, entry: Entry, verdict: Verdict, deep: bool, progress: Progress
) -> None:
    root = store / entry.path
    for name, digest in entry.files.items():
        verdict.count("small files")
        try:
            damaged = hashlib.sha256(read_file(root / name)).hexdigest() != digest
            if damaged:
                verdict.add_damage(f"{entry.path}/{name} is damaged")
        except OSError:
            verdict.add_damage(f"{entry.path}/{name} is gone")
    try:
        generation = Generation(store, entry)
        manifest = generation.manifest()
        digests = generation.shards["record"].to_pylist()
        spec = generation.spec
        if len(manifest) != spec.rows or len(digests) != spec.shards:
            raise CacheError(f"{entry.path}: {len(manifest)} rows and {len(digests)} shards")
    except CacheError as error:
        if verdict.repairable:
            verdict.add_damage(str(error))
        return  # its shards can be checked only against its table and spec
    tables = {n: d for n, d in entry.files.items() if n.startswith(CONTENT)}
    content = [entry.fingerprint, tables, hashlib.sha256(b"".join(digests)).hexdigest()]
    if hashlib.sha256(canonical(content)).hexdigest() != entry.digest:
        verdict.add_damage(f"{INDEX}: the digest of {entry.path} is not that of its records")
    targets = 0
    captioned = manifest.captioned() & (TEXT_IDS in spec.arrays())
    if TEXT_IDS in spec.arrays():
        verdict.count("texts", int(captioned.sum()))
    for block in range(spec.blocks):
        for view in range(spec.views):
            texts = np.flatnonzero(captioned[slice(*spec.block_rows(block))] & (view == 0))
            errors, count = _check_shard(generation, block, view, texts.tolist(), deep)
            targets += count
            verdict.count("shards")
            shard = record_name(block, view)[:-5]
            verdict.corrupt += [f"{entry.path}, shard {shard}: {error}" for error in errors]
            if errors:
                verdict.shards.append((entry.path, block, view))
            progress.advance(verdict.checked["shards"], f"{len(verdict.shards)} damaged")
    verdict.count("targets", targets)
    if not verdict.corrupt and targets != (spec.rows - entry.bad) * spec.views:
        verdict.add_damage(
            f"{entry.path} has {targets:,} targets, the index says "
            f"{(spec.rows - entry.bad) * spec.views:,}"
        )


def _check_shard(
    generation: Generation, block: int, view: int, texts: list[int], deep: bool
) -> tuple[list[str], int]:
    """(errors in a shard, how many targets it has).

    `texts` are the rows with a text, counted from the shard's first row.
    """
    spec = generation.spec
    try:
        record = generation.record(block, view)
    except CacheError as error:
        return [error.found], 0
    start, stop = spec.block_rows(block)
    if (record["block"], record["view"], record["rows"]) != (block, view, [start, stop]):
        return [f"its record is of block {record['block']}, view {record['view']}"], 0
    bad = {int(row) - start for row in record["bad"]}
    good = [i for i in range(stop - start) if i not in bad]
    errors = []
    listed = {file["path"]: file for file in record["files"]}
    for name, path in spec.files(block, view).items():
        array = spec.arrays().get(name)
        rows = good if array is None or array.of_views else texts
        if (path in listed) != bool(rows):
            errors.append(f"{name} is {'not ' if rows else ''}in its record")
        elif path in listed:
            damage = _check_file(generation.root / path, array, rows, listed[path], deep)
            errors += [f"{name} ({path}) {damage}"] if damage else []
    if deep and not errors:
        errors += _check_rows(generation, np.array(good) + start, view)
        errors += _check_texts(generation, np.array(texts, np.int64) + start + spec.first_row)
    return errors, len(good)


def _check_file(
    path: AnyPath, array: ArraySpec | None, good: list[int], file: dict, deep: bool
) -> str:
    """The error in a file whose size is that of its record, or an empty text."""
    if array and array.shard:
        size = file["bytes"]
        length = min(size, 16 * array.shard[0] + 4)
        tail = read_file(path, first=size - length, size=length)
        table, stated = tail[:-4], struct.unpack("<I", tail[-4:])[0]
        if google_crc32c.value(table) != stated:
            return "has a damaged shard index"
        pairs = np.frombuffer(table, "<u8").reshape(-1, 2)
        if np.flatnonzero(pairs[:, 1] != np.uint64(2**64 - 1)).tolist() != good:
            return "has other rows than its record says"
        ends = pairs[good].sum(axis=1)
        if (ends > size - len(tail)).any():
            return "has a shard index that points outside"
    if deep:
        digest = hashlib.sha256()
        for piece in pieces_of(path):
            digest.update(piece)
        if digest.hexdigest() != file["sha256"]:
            return "does not have the SHA-256 of its record"
    return ""


def _check_rows(generation: Generation, local: np.ndarray, view: int) -> list[str]:
    """Errors met when every row of a shard is read as training reads it."""
    spec = generation.spec
    names = list(spec.view_arrays())
    for part in np.array_split(local, -(-len(local) // _BATCH) or 1):
        if not len(part):
            continue
        views = np.full(len(part), spec.first_view + view)
        try:
            targets = generation.read(names, part + spec.first_row, views)
        except CacheError as error:
            return [error.found]
        if spec.stored_views != "none":
            rows = part + spec.first_row
            try:
                pictures = generation.packed(rows, views)
            except CacheError as error:
                return [error.found]
            checksums = generation.pixel_checksums(rows, views).tolist()
            for row, picture, expected in zip(rows.tolist(), pictures, checksums, strict=True):
                try:
                    same = checksum(unpack(picture)) == expected
                except ValueError:
                    same = False
                if not same:
                    return [f"the stored picture of row {row} is not what the teacher saw"]
        attention = targets.get("attention", np.ones(1))
        if not ((attention > 0) & np.isfinite(attention)).all():
            return ["has attention that is not finite and > 0"]
    return []


def _check_texts(generation: Generation, rows: np.ndarray) -> list[str]:
    """Errors met when texts are read as training reads them; `rows` of the whole store."""
    try:
        features = read_texts(generation, rows).features if len(rows) else None
    except CacheError as error:
        return [error.found]
    if features is None or np.allclose(np.linalg.norm(features, axis=1), 1, atol=1e-4):
        return []
    return ["has texts that are not of length 1"]


def teacher_of(cache: TargetCache, named: TeacherSpec | None, device: str) -> Teacher:
    """The teacher of a store: the recorded one, or as it is `named` now. Raises MilanError."""
    first = cache.generations[0]
    named = named or TeacherSpec.recorded(first.origin["teacher"])
    spec = named.as_stored(first.spec.teacher, texts=bool(first.spec.texts))
    teacher = load_teacher(spec, device=device)
    if not same_teacher(teacher, cache.spec):
        raise TeacherError(f"teacher {teacher.about['name']} is not the one of the store")
    return teacher


def _audit_views(cache: TargetCache, verdict: Verdict, audit: Audit, progress: Progress) -> None:
    """Compare the teacher with the stored targets of random views, and then of random texts.

    Targets of other images (views paired in another order) must differ, or the check is void.
    """
    first = cache.generations[0]
    if not cache.spec.has_targets:
        raise CacheError(
            f"{cache.path} has no targets of a teacher that could be audited", fix="without --audit"
        )
    try:
        dataset = CachedDataset(cache, data_root=audit.data_root)
        teacher = teacher_of(cache, audit.teacher, audit.device)
    except MachineError:
        raise
    except (CacheError, DataError, TeacherError) as error:
        verdict.foreign.append(str(error))
        return
    rng = np.random.default_rng(audit.seed % 2**64)
    good = cache.good_rows()
    rows = good[rng.choice(len(good), min(audit.views, len(good)), replace=False)]
    views = rng.integers(0, cache.views, len(rows))
    min_cosine = first.fidelity["cosine"]["patch"]["p01"] - 1e-3 if first.fidelity else 0.99
    progress.begin("audit", len(rows), "views")
    computed_parts: list[torch.Tensor] = []
    stored_parts: list[torch.Tensor] = []

    def read(part: np.ndarray) -> tuple[np.ndarray, np.ndarray, torch.Tensor]:
        pixels = dataset.pixels(rows[part], views[part])
        targets = cache.read(rows[part], views[part])
        scale = None if targets.scale is None else torch.from_numpy(targets.scale)
        return part, pixels, cache.codec.decode(torch.from_numpy(targets.codes), scale)

    def batches() -> Iterator[tuple[int, list[np.ndarray]]]:
        for part, pixels, stored in ahead:
            stored_parts.append(stored)
            yield int(part[-1]) + 1, list(pixels)

    def compute(pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"features": teacher.targets(pixels)[0]}

    parts = np.array_split(np.arange(len(rows)), -(-len(rows) // _BATCH))
    try:
        # One thread reads the next batches: what it reads is opened as it is needed.
        with ThreadPoolExecutor(1) as pool, Ahead(read, parts, pool, 2) as ahead:
            for done, result in through_device(batches(), compute, teacher.device, largest=_BATCH):
                computed_parts.append(torch.from_numpy(result["features"].copy()))
                progress.advance(done, "")
    except MachineError:
        raise
    except DataError as error:
        verdict.foreign.append(str(error))
        return
    finally:
        progress.end()
    computed, stored = torch.cat(computed_parts), torch.cat(stored_parts)
    cosine = torch.nn.functional.cosine_similarity(computed, stored, dim=-1).mean(1)
    shuffled = torch.nn.functional.cosine_similarity(computed.roll(1, 0), stored, dim=-1).mean(1)
    verdict.count("audited views", len(rows))
    for i in torch.nonzero(cosine < min_cosine).flatten().tolist():
        verdict.corrupt.append(
            f"row {rows[i]}, view {views[i]}: the teacher's output differs "
            f"(cosine {cosine[i]:.4f}, expected {min_cosine:.4f})"
        )
        verdict.shards.append(_shard_of(cache, int(rows[i]), int(views[i])))
    if len(rows) > 1 and float(shuffled.mean()) >= min_cosine:
        verdict.add_damage("the audit is void: the targets of other images agree as well")
    captioned = cache.captioned
    if teacher.texts and len(captioned):
        rows = rng.choice(captioned, min(audit.views, len(captioned)), replace=False)
        captions = cache.manifest.take(rows).captions(0, len(rows))
        ids = teacher.texts.tokenise([some[0] for some in captions])
        cosines = (teacher.texts.features(ids) * cache.texts(rows).features).sum(axis=1)
        verdict.count("audited texts", len(rows))
        for row, cos in zip(rows.tolist(), cosines.tolist(), strict=True):
            if cos < _MIN_TEXT_COSINE:
                verdict.corrupt.append(f"row {row}: the text tower's output differs ({cos:.4f})")
                verdict.shards.append(_shard_of(cache, row, 0))


def _shard_of(cache: TargetCache, row: int, view: int) -> tuple[str, int, int]:
    """(generation, block, view) of the shard with a row and view of the whole store."""
    address = np.array([row]), np.array([view])
    generation = next(g for g in cache.generations if g.holds(*address)[0])
    spec = generation.spec
    return generation.entry.path, (row - spec.first_row) // spec.shard_size, view - spec.first_view
