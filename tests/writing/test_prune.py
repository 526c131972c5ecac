"""`milan store prune`: what goes, what stays byte for byte, and what runs pin."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import EXTRACTION, FORK, SMALL, Notes, run_here, tree, weights

from milan.core.paths import as_path, files_below, read_files
from milan.errors import CacheError, ConfigError, DataError, MilanError
from milan.store.cache import TargetCache
from milan.store.format import Index
from milan.training.pretrain import pretrain
from pipeline.copy_store import copy_store
from pipeline.extract import extract_targets
from pipeline.prune import Decision, Drop, prune
from pipeline.verify import GOOD, verify
from pipeline.writing.disk import Disk

CUT = {"zarr.json", "shards.parquet"}
CUT |= {f"{array}/zarr.json" for array in ("features", "scale", "attention", "crop")}
INT8, FLOAT = "teacher0/int8", "teacher0/float16"


@pytest.fixture(scope="module")
def grown(
    store: Path, photos: Path, teacher_files: dict[str, str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:  # fmt: skip
    """`store` (000: int8, views 0 to 2), grown by views 2 to 4 (001), and float16 (002)."""
    path = tmp_path_factory.mktemp("grown") / "t.zarr"
    shutil.copytree(store, path)
    for more in ({"views": 4}, {"views": 4, "codec": "float16", "extend": True}):
        extract_targets(str(photos), out=str(path), **{**EXTRACTION, **teacher_files, **more})
    return path


@pytest.fixture
def mine(grown: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(grown, tmp_path / "t.zarr"))


def yes(decision: Decision) -> bool:
    return True


def targets(store: Path, layer: str, views: int) -> dict[str, np.ndarray]:
    """All that a layer has of the first `views`."""
    cache = TargetCache(store, layer=layer)
    rows, which = (part.ravel() for part in np.mgrid[: cache.rows, :views])
    read = cache.read(rows, which)
    assert read.codes is not None
    crops, pixels = cache.crops(rows, which), cache.pixel_checksums(rows, which)
    return {"codes": read.codes, "attention": read.attention, "crops": crops, "pixels": pixels}


def layers_of(store: Path) -> dict[str, tuple[int, int]]:
    """Layer -> rows, views."""
    caches = [TargetCache(store, layer=name) for name in TargetCache(store).layers]
    return {cache.layer: (cache.rows, cache.views) for cache in caches}


@pytest.mark.parametrize(
    ("drop", "left", "gone"),
    [
        (Drop(layers=[INT8]), {FLOAT: (24, 4)}, ["000", "001"]),
        (Drop(views=2), {INT8: (24, 2), FLOAT: (24, 2)}, ["001", "002"]),
        (Drop(views=3, layers=[FLOAT]), {INT8: (24, 3)}, ["001", "002"]),
        (Drop(views=9), {INT8: (24, 4), FLOAT: (24, 4)}, []),
    ],
    ids=["layer", "views", "a view and a layer", "nothing"],
)
def test_what_is_left_keeps_its_bytes(
    drop: Drop, left: dict, gone: list[str], grown: Path, mine: Path
) -> None:
    """Every file that stays, and every target; the store is whole, and its log is all that grew."""
    before, asked = tree(mine), list[Decision]()
    decision = prune(mine, drop, agree=lambda decision: bool(asked.append(decision)) or True)
    assert [path[-3:] for path, _ in decision.rows] == gone
    assert asked == ([decision] if gone else [])
    assert layers_of(mine) == left
    assert verify(mine, deep=True).code == GOOD
    after = tree(mine)
    freed = {name: data for name, data in before.items() if name not in after}
    assert {name.split("/")[1] for name in freed} == {*gone}
    kept = before.keys() & after.keys() - {"index.json"}
    assert all(before[name] == after[name] for name in kept)
    for layer, (_, views) in left.items():
        mine_now, then = targets(mine, layer, views), targets(grown, layer, views)
        assert all(np.array_equal(mine_now[name], then[name]) for name in then)
    # A generation that lost views: new metadata around the shards and records that there were.
    for name in after.keys() - before.keys():
        below = name.split("/", 2)[2]
        source = "002" if FLOAT in left else "001"
        same = before[f"generations/{source}/{below}"] == after[name]
        assert same == (below not in CUT), name
    shards = [name for name in before if name.split("/")[2:4][1:] == ["c"]]
    cut = sum(len(after[n]) for n in after.keys() - before.keys() if n.split("/")[3:4] == ["c"])
    assert decision.bytes == sum(len(freed[name]) for name in shards if name in freed) - cut


def test_what_runs_pin(
    store: Path, mine: Path, photos: Path, teacher_files: dict[str, str], tmp_path: Path
) -> None:
    """Stays; the run goes on with the same bits although others went before what it pins. A later
    growth takes none of their numbers."""
    short = {**SMALL, "epochs": 1, "layer": FLOAT, "report_to": "none"}
    for name, stop in (("alone", None), ("run", 2)):
        pretrain(str(mine), out=str(tmp_path / "runs" / name), stop_after=stop, **short)
    runs, run = tmp_path / "runs", tmp_path / "runs/run"
    with pytest.raises(CacheError, match=r"runs/(run|alone) pins generations/002"):
        prune(mine, Drop(views=2), runs=[runs], agree=yes)
    shutil.copytree(run, tmp_path / "other" / "r")
    notes, text = Notes(), (tmp_path / "other/r/run.json").read_text()
    assert TargetCache(store).digest not in text
    decision = prune(mine, Drop(unpinned=True), runs=[runs], agree=yes, progress=notes)
    assert [path[-3:] for path, _ in decision.rows] == ["000", "001"]
    assert not notes.lines
    more = {**EXTRACTION, **teacher_files, "views": 5, "codec": "float16"}
    extract_targets(str(photos), out=str(mine), **more)
    pretrain(str(mine), out=str(run), **short)
    assert weights(run) == weights(runs / "alone")
    index = Index.read(mine)
    assert [entry.number for entry in index.generations] == [2, 3]
    assert (index.count, index.pruned) == (4, ("generations/000", "generations/001"))
    with pytest.raises(DataError, match="no run in or below it"):
        prune(mine, Drop(unpinned=True), runs=[photos], agree=yes)
    with pytest.raises(ConfigError, match="no run pins anything"):
        prune(store, Drop(unpinned=True), runs=[runs], agree=yes, progress=notes)
    assert f"{run} pins nothing of {store}: it knows another store" in notes.lines


def test_it_grows_again(
    mine: Path, photos: Path, teacher_files: dict[str, str], grown: Path
) -> None:
    """After the first generation went, and the last: under new numbers, by the same line."""
    prune(mine, Drop(layers=[FLOAT], views=2), agree=yes)
    extract_targets(str(photos), out=str(mine), **{**EXTRACTION, **teacher_files, "views": 4})
    assert [e.path[-3:] for e in Index.read(mine).generations] == ["000", "003"]
    now, then = targets(mine, INT8, 4), targets(grown, INT8, 4)
    assert all(np.array_equal(now[name], then[name]) for name in then)
    assert verify(mine, deep=True).code == GOOD


@pytest.mark.parametrize(
    ("drop", "match"),
    [
        (
            Drop(layers=["teacher0/int4"]),
            "no layer .*; expected: one of .*; try: teacher0/int8",
        ),
        (Drop(generations=[7]), "no generation 7; expected: one of 0, 1, 2"),
        (Drop(generations=[0]), "would have 48 targets of teacher0/int8; expected: 24 rows x 4"),
        (Drop(layers=[INT8, FLOAT]), "nothing would be left"),
        (Drop(views=0), "--views 0; expected: 1 or more"),
        (Drop(unpinned=True), "no run pins anything of .*; expected: --runs"),
    ],
)
def test_refused(drop: Drop, match: str, mine: Path) -> None:
    """In one line, and nothing changes."""
    before = tree(mine)
    with pytest.raises(MilanError, match=match):
        prune(mine, drop, agree=yes)
    assert tree(mine) == before


def test_the_command_says_it_and_asks(mine: Path, store: Path) -> None:
    """Without a terminal and without --yes nothing goes."""
    before = tree(mine)
    ran = run_here("store", "prune", mine, "--layer", FLOAT)
    assert ran.code == 1
    assert f"{mine} would lose" in ran.err
    assert "try: --yes" in ran.err
    assert "generations/002" in ran.out
    assert "teacher0/float16, rows 0 to 24, views 0 to 4:" in ran.out
    assert "not known: what runs (none was named: --runs) pin" in ran.out
    assert tree(mine) == before
    ran = run_here("store", "prune", mine, "--layer", FLOAT, "--generation", 1, "--yes")
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.splitlines()[-1].startswith("dropped: ")
    assert tree(mine).keys() - {"index.json"} == tree(store).keys() - {"index.json"}


def content(store: Path) -> dict[str, bytes]:
    """Its files, by the place of their generation in the index and not its number; and names of
    those that do not count."""
    place = {e.path: str(i) for i, e in enumerate(Index.read(store).generations)}
    files = {}
    for name, data in tree(store).items():
        generation = "/".join(name.split("/")[:2])
        files[name.replace(generation, place.get(generation, generation))] = data
    return {name: data for name, data in files.items() if name != "index.json"}


@pytest.mark.soak
def test_stopped_before_any_write(mine: Path, grown: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each time some writes further: the old store or the new one, whole; the same line ends it."""
    drop, old = Drop(views=3), layers_of(grown)
    done = Path(shutil.copytree(grown, mine.parent / "done.zarr"))
    prune(done, drop, agree=yes)
    new, wanted = layers_of(done), content(done)
    left = {"writes": 0}

    def counted(name: str) -> Callable[..., Any]:
        method = getattr(Disk, name)

        def write(self: Disk, *arguments: Any) -> Any:
            if left["writes"] == 0:
                raise KeyboardInterrupt
            left["writes"] -= 1
            return method(self, *arguments)

        return write

    for name in ("write", "add_generation", "remove_generation"):
        monkeypatch.setattr(Disk, name, counted(name))
    states = []
    for number in (1, 6, 9, 5, 1, 99):
        left["writes"] = number
        with suppress(KeyboardInterrupt):
            prune(mine, drop, agree=yes)
        states.append(layers_of(mine))
        assert verify(mine).code == GOOD
        if left["writes"]:
            break
    assert states[:3] == [old] * 3
    assert states[-2:] == [new, new]
    assert content(mine) == wanted
    assert verify(mine, deep=True).code == GOOD


@pytest.mark.soak
@pytest.mark.usefixtures("s3")
def test_in_a_bucket(mine: Path, grown: Path) -> None:
    """The same bytes as on a disk, and no object of what went."""
    url = "s3://models/pruned/t.zarr"
    copy_store(grown, url)
    for store in (mine, url):
        prune(store, Drop(views=3, generations=[1]), agree=yes)
    where, there = as_path(url), tree(mine)
    names = sorted(n for n, _ in files_below(where) if not n.startswith("extract.log"))
    assert names == sorted(there)
    same = [name for name in names if not name.endswith("origin.json")]
    assert dict(zip(same, read_files(where, same), strict=True)) == {n: there[n] for n in same}
    assert verify(url, deep=True).code == GOOD


@pytest.mark.soak
def test_killed_at_random_moments(mine: Path, grown: Path) -> None:
    """Thirty times: old or new, whole, and the same line ends with the same bytes."""
    drop, moment, old = Drop(views=3), random.Random(5), layers_of(grown)
    done = Path(shutil.copytree(grown, mine.parent / "done.zarr"))
    started = time.monotonic()
    in_a_fork(done).join()
    whole = time.monotonic() - started
    new, wanted = layers_of(done), content(done)
    seen = []
    for _ in range(30):
        process = in_a_fork(mine)
        time.sleep(moment.uniform(0, whole))
        process.kill()
        process.join()
        seen.append(layers_of(mine))
        assert seen[-1] in (old, new)
        assert verify(mine, deep=True).code == GOOD
        if moment.random() < 0.3:
            prune(mine, drop, agree=yes)
            assert content(mine) == wanted
            shutil.rmtree(mine)
            shutil.copytree(grown, mine)
    assert old in seen
    assert new in seen


def in_a_fork(store: Path) -> Any:
    process = FORK.Process(target=_prune, args=(str(store),))
    process.start()
    return process


def _prune(store: str) -> None:
    prune(store, Drop(views=3), agree=yes)
