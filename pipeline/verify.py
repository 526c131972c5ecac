"""Is a store what it says it is? Every proof checked.

index -> small files of each generation, by digest
      -> table of shards -> records, by digest -> files, by size; shard indexes, by crc32c
deep: -> files, by digest; every chunk and row, by crc32c; attention positive and finite
audit: the teacher again, on random views through the training image path
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass, field, replace

import google_crc32c
import numpy as np
import torch

from milan.core.paths import AnyPath, as_path, folders_in, pieces_of, read_file
from milan.core.progress import NoProgress, Progress
from milan.data.dataset import CachedDataset
from milan.errors import CacheError, DataError, TeacherError
from milan.images.views import checksum, unpack
from milan.store.cache import TargetCache
from milan.store.format import (
    CONTENT,
    GENERATIONS,
    INDEX,
    TEXT,
    ArraySpec,
    Entry,
    Index,
    canonical,
    record_name,
)
from milan.store.generation import Generation
from milan.store.texts import read_texts
from pipeline.teachers.load import load_teacher
from pipeline.teachers.spec import TeacherSpec

GOOD, CORRUPT, INCOMPLETE, FOREIGN = 0, 3, 4, 5
_BATCH = 64  # rows decoded at once
_TEXT_FLOOR = 0.999  # cosine that kernels and libraries leave of a text


@dataclass
class Verdict:
    """What was found; `code` is the exit code of `milan verify`."""

    path: str
    corrupt: list[str] = field(default_factory=list)
    """What is damaged, with its name."""
    incomplete: list[str] = field(default_factory=list)
    """What is not there yet."""
    foreign: list[str] = field(default_factory=list)
    """What is of another teacher or data set."""
    shards: list[tuple[str, int, int]] = field(default_factory=list)
    """(generation, block, view) of the damaged shards, which can be made again."""
    mendable: bool = True
    """Whether shards are all that is damaged."""
    checked: dict[str, int] = field(default_factory=dict)
    """How much was looked at."""

    @property
    def code(self) -> int:
        """0 good, 3 corrupt, 4 incomplete, 5 another teacher or data set."""
        if self.corrupt:
            return CORRUPT
        if self.incomplete:
            return INCOMPLETE
        return FOREIGN if self.foreign else GOOD

    def damage(self, what: str) -> None:
        """Add damage that making shards again does not mend."""
        self.corrupt.append(what)
        self.mendable = False

    def count(self, what: str, number: int = 1) -> None:
        """Add to `checked`."""
        self.checked[what] = self.checked.get(what, 0) + number


def verify(
    path: str | AnyPath,
    *,
    deep: bool = False,
    audit: int = 0,
    seed: int = 0,
    data_root: str | None = None,
    teacher: TeacherSpec | None = None,
    device: str = "auto",
    progress: Progress | None = None,
) -> Verdict:
    """Check a store. Reads records and shard indexes; `deep` reads all there is.

    `audit` runs the teacher on so many random views, rendered as training renders them: as the
    store remembers it, or `teacher`. Raises nothing for damage: the verdict holds it.
    """
    progress = progress or NoProgress()
    store = as_path(path)
    verdict = Verdict(str(path))
    try:
        index = Index.read(store)
    except CacheError as error:
        there = (store / INDEX).exists()
        verdict.damage(str(error)) if there else verdict.incomplete.append(str(error))
        return verdict
    progress.begin("verify", sum(entry.shards for entry in index.generations), "shards")
    for entry in index.generations:
        _generation(store, entry, verdict, deep, progress)
    progress.end()
    if not verdict.corrupt:
        for layer in dict.fromkeys(entry.layer for entry in index.generations):
            try:
                cache = TargetCache(store, layer=layer)
                verdict.count("images x views", cache.rows * cache.views)
            except CacheError as error:
                verdict.damage(str(error))
    listed = {entry.path for entry in index.generations}
    for name in sorted(folders_in(store / GENERATIONS)):
        if name[:1].isdecimal() and f"{GENERATIONS}/{name}" not in listed:
            verdict.incomplete.append(f"{GENERATIONS}/{name} is begun and not in the index")
    if audit and not verdict.corrupt:
        _audit(TargetCache(store), verdict, audit, seed, data_root, teacher, device, progress)
    return verdict


def _generation(
    store: AnyPath, entry: Entry, verdict: Verdict, deep: bool, progress: Progress
) -> None:
    root = store / entry.path
    for name, digest in entry.files.items():
        verdict.count("small files")
        try:
            found = hashlib.sha256(read_file(root / name)).hexdigest()
        except OSError:
            found = ""
        if found != digest:
            what = "gone" if not found else "damaged"
            verdict.damage(f"{entry.path}/{name} is {what}")
    try:
        generation = Generation(store, entry)
        manifest = generation.manifest()
        proofs = generation.shards["record"].to_pylist()
        spec = generation.spec
        if len(manifest) != spec.rows or len(proofs) != spec.shards:
            raise CacheError(f"{entry.path}: {len(manifest)} rows and {len(proofs)} shards")
    except CacheError as error:
        if verdict.mendable:
            verdict.damage(str(error))
        return  # without its table and spec nothing of it can be believed
    tables = {n: d for n, d in entry.files.items() if n.startswith(CONTENT)}
    content = [entry.fingerprint, tables, hashlib.sha256(b"".join(proofs)).hexdigest()]
    if hashlib.sha256(canonical(content)).hexdigest() != entry.digest:
        verdict.damage(f"{INDEX}: the digest of {entry.path} is not that of its records")
    targets = 0
    captioned = manifest.captioned() & (TEXT in spec.arrays())
    if TEXT in spec.arrays():
        verdict.count("texts", int(captioned.sum()))
    for block in range(spec.blocks):
        for view in range(spec.views):
            texts = np.flatnonzero(captioned[slice(*spec.block_rows(block))] & (view == 0))
            wrong, held = _shard(generation, block, view, texts.tolist(), deep)
            targets += held
            verdict.count("shards")
            for what in wrong:
                shard = record_name(block, view)[:-5]
                verdict.corrupt.append(f"{entry.path}, shard {shard}: {what}")
            if wrong:
                verdict.shards.append((entry.path, block, view))
            progress.advance(verdict.checked["shards"], f"{len(verdict.shards)} damaged")
    verdict.count("targets", targets)
    if not verdict.corrupt and targets != (spec.rows - entry.bad) * spec.views:
        verdict.damage(
            f"{entry.path} holds {targets:,} targets, the index says "
            f"{(spec.rows - entry.bad) * spec.views:,}"
        )


def _shard(
    generation: Generation, block: int, view: int, texts: list[int], deep: bool
) -> tuple[list[str], int]:
    """(what is wrong with a shard, how many targets it holds).

    `texts` are those of its rows that have one, counted from its first.
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
    wrong = []
    listed = {file["path"]: file for file in record["files"]}
    for name, path in spec.files(block, view).items():
        array = spec.arrays().get(name)
        rows = good if array is None or array.of_views else texts
        if (path in listed) != bool(rows):
            wrong.append(f"{name} is {'not ' if rows else ''}in its record")
        elif path in listed:
            told = _file(generation.root / path, array, rows, listed[path], deep)
            wrong += [f"{name} ({path}) {told}"] if told else []
    if deep and not wrong:
        wrong += _rows(generation, np.array(good) + start, view)
        wrong += _texts(generation, np.array(texts, np.int64) + start + spec.first_row)
    return wrong, len(good)


def _file(path: AnyPath, array: ArraySpec | None, good: list[int], file: dict, deep: bool) -> str:
    """What is wrong with a file of a shard that has the size of its record, or nothing."""
    if array and array.shard:
        size = file["bytes"]
        length = min(size, 16 * array.shard[0] + 4)
        tail = read_file(path, first=size - length, size=length)
        table, stated = tail[:-4], struct.unpack("<I", tail[-4:])[0]
        if google_crc32c.value(table) != stated:
            return "has a damaged shard index"
        pairs = np.frombuffer(table, "<u8").reshape(-1, 2)
        if np.flatnonzero(pairs[:, 1] != np.uint64(2**64 - 1)).tolist() != good:
            return "holds other rows than its record says"
        ends = pairs[good].sum(axis=1)
        if (ends > size - len(tail)).any():
            return "has a shard index that points outside"
    if deep:
        digest = hashlib.sha256()
        for piece in pieces_of(path):
            digest.update(piece)
        if digest.hexdigest() != file["sha256"]:
            return "has not the SHA-256 of its record"
    return ""


def _rows(generation: Generation, local: np.ndarray, view: int) -> list[str]:
    """Every row of a shard read as training reads it."""
    spec = generation.spec
    names = list(spec.view_arrays())
    for part in np.array_split(local, -(-len(local) // _BATCH) or 1):
        if not len(part):
            continue
        views = np.full(len(part), spec.first_view + view)
        try:
            got = generation.read(names, part + spec.first_row, views)
        except CacheError as error:
            return [error.found]
        if spec.stored_views != "none":
            for row in (part + spec.first_row).tolist():
                v = spec.first_view + view
                try:
                    pixels = unpack(generation.packed(row, v))
                    same = checksum(pixels) == generation.checksum(row, v)
                except CacheError as error:
                    return [error.found]
                except ValueError:
                    same = False
                if not same:
                    return [f"the stored picture of row {row} is not what the teacher saw"]
        if not ((got["attention"] > 0) & np.isfinite(got["attention"])).all():
            return ["has attention that is not finite and > 0"]
    return []


def _texts(generation: Generation, rows: np.ndarray) -> list[str]:
    """Every text of a shard read as training reads it; `rows` of the whole store."""
    try:
        lengths = np.linalg.norm(read_texts(generation, rows).features, axis=1) if len(rows) else 1
    except CacheError as error:
        return [error.found]
    return [] if np.allclose(lengths, 1, atol=1e-4) else ["has texts that are not of length 1"]


def _audit(
    cache: TargetCache,
    verdict: Verdict,
    count: int,
    seed: int,
    data_root: str | None,
    spec: TeacherSpec | None,
    device: str,
    progress: Progress,
) -> None:
    """The teacher again on random views; and on a shuffled pairing, which must not agree."""
    first = cache.generations[0]
    try:
        dataset = CachedDataset(cache, data_root=data_root)
        known = spec or TeacherSpec(**first.origin["teacher"])
        teacher = load_teacher(replace(known, texts=bool(first.spec.texts)), device=device)
    except (CacheError, DataError, TeacherError) as error:
        verdict.foreign.append(str(error))
        return
    texts = teacher.texts.identity if teacher.texts else None
    if teacher.identity != cache.spec.teacher or texts != cache.spec.texts:
        verdict.foreign.append(f"teacher {teacher.about['name']} is not the one of the store")
        return
    generator = np.random.default_rng(seed)
    good = cache.good_rows()
    rows = good[generator.choice(len(good), min(count, len(good)), replace=False)]
    views = generator.integers(0, cache.views, len(rows))
    floor = first.fidelity["cosine"]["patch"]["p01"] - 1e-3 if first.fidelity else 0.99
    progress.begin("audit", len(rows), "views")
    told: list[torch.Tensor] = []
    kept: list[torch.Tensor] = []
    for part in np.array_split(np.arange(len(rows)), -(-len(rows) // _BATCH)):
        try:
            pixels = dataset.pixels(rows[part], views[part])
        except DataError as error:
            verdict.foreign.append(str(error))
            progress.end()
            return
        targets = cache.read(rows[part], views[part])
        scale = None if targets.scale is None else torch.from_numpy(targets.scale)
        kept.append(cache.codec.decode(torch.from_numpy(targets.codes), scale))
        told.append(teacher.targets(pixels)[0].cpu())
        progress.advance(int(part[-1]) + 1, "")
    progress.end()
    now, before = torch.cat(told), torch.cat(kept)
    cosine = torch.nn.functional.cosine_similarity(now, before, dim=-1).mean(1)
    shuffled = torch.nn.functional.cosine_similarity(now.roll(1, 0), before, dim=-1).mean(1)
    verdict.count("audited views", len(rows))
    for i in torch.nonzero(cosine < floor).flatten().tolist():
        verdict.corrupt.append(
            f"row {rows[i]}, view {views[i]}: the teacher says something else "
            f"(cosine {cosine[i]:.4f}, expected {floor:.4f})"
        )
        verdict.shards.append(_place(cache, int(rows[i]), int(views[i])))
    if len(rows) > 1 and float(shuffled.mean()) >= floor:
        verdict.damage("the audit proves nothing: targets of other images agree as well")
    captioned = cache.captioned
    if teacher.texts and len(captioned):
        rows = generator.choice(captioned, min(count, len(captioned)), replace=False)
        captions = cache.manifest.take(rows).captions(0, len(rows))
        now_ids = teacher.texts.tokenise([text or "" for text in captions])
        agree = (teacher.texts.features(now_ids) * cache.texts(rows).features).sum(axis=1)
        verdict.count("audited texts", len(rows))
        for row, cos in zip(rows.tolist(), agree.tolist(), strict=True):
            if cos < _TEXT_FLOOR:
                verdict.corrupt.append(f"row {row}: the text tower says something else ({cos:.4f})")
                verdict.shards.append(_place(cache, row, 0))


def _place(cache: TargetCache, row: int, view: int) -> tuple[str, int, int]:
    at = np.array([row]), np.array([view])
    generation = next(g for g in cache.generations if g.holds(*at)[0])
    spec = generation.spec
    return generation.entry.path, (row - spec.first_row) // spec.shard_size, view - spec.first_view
