"""Random changes of the data, random growth, random kills: the store stays what it says it is."""

from __future__ import annotations

import io
import random
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import tree
from PIL import Image

from milan.errors import MilanError
from milan.store.cache import TargetCache
from milan.store.format import Index
from pipeline.extract import extract_targets
from pipeline.verify import verify
from pipeline.writing.store import Store, Writer

_STEPS = 25


class Folder:
    """Class folders of photographs, changed as people and disks change them."""

    def __init__(self, root: Path, chance: random.Random) -> None:
        self.root, self.chance, self.made = root, chance, 0
        self.damaged: dict[Path, bytes] = {}
        self.deleted: dict[Path, bytes] = {}
        for _ in range(7):
            self.add()

    def whole(self) -> list[Path]:
        return [path for path in sorted(self.root.rglob("*.jpg")) if path not in self.damaged]

    def add(self) -> None:
        path = self.root / f"c{self.chance.randrange(3)}/{self.made:03d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(self.picture())
        self.made += 1

    def picture(self) -> bytes:
        pixels = np.random.default_rng(self.chance.randrange(1 << 30)).integers(0, 256, (5, 7, 3))
        file = io.BytesIO()
        Image.fromarray(pixels.astype(np.uint8)).resize((40, 50)).save(file, "jpeg")
        return file.getvalue()

    def damage(self) -> None:
        path = self.chance.choice(self.whole())
        self.damaged[path] = path.read_bytes()
        path.write_bytes(self.damaged[path][:150])

    def restore(self) -> None:
        if self.damaged:
            path = self.chance.choice(sorted(self.damaged))
            path.write_bytes(self.damaged.pop(path))

    def delete(self) -> None:
        path = self.chance.choice(self.whole())
        self.deleted[path] = path.read_bytes()
        path.unlink()

    def undelete(self) -> None:
        if self.deleted:
            path = self.chance.choice(sorted(self.deleted))
            path.write_bytes(self.deleted.pop(path))

    def edit(self) -> None:
        self.chance.choice(self.whole()).write_bytes(self.picture())

    def change(self) -> None:
        ways = [self.add, self.restore, self.restore, self.undelete]
        ways += [self.damage, self.delete, self.edit] if len(self.whole()) > 4 else []
        self.chance.choice(ways)()


class Killed(BaseException):
    pass


@pytest.fixture
def kill_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None], None]:
    """kill_after(n): the n-th thing that is written from now on is the last; None: all are."""
    left: list[int | None] = [None]

    def killing(write: Callable[..., Any]) -> Callable[..., Any]:
        def written(*arguments: Any) -> Any:
            result = write(*arguments)
            if left[0] is not None:
                left[0] -= 1
                if left[0] < 0:
                    left[0] = None
                    raise Killed
            return result

        return written

    for kind, name in ((Writer, "commit"), (Writer, "finish"), (Store, "_create")):
        monkeypatch.setattr(kind, name, killing(getattr(kind, name)))
    return lambda count: left.__setitem__(0, count)


def check(store: Path, before: dict[str, bytes]) -> None:
    """Nothing published was rewritten; an image has one row with targets, all views of one file."""
    now = tree(store)
    parts = tuple(f"{entry.path}/" for entry in Index.read(store).generations)
    kept = {name: data for name, data in before.items() if name.startswith(parts)}
    assert {name: now.get(name) for name in kept} == kept
    assert verify(store, deep=True).corrupt == []
    cache = TargetCache(store)
    keys, labels, rows = cache.manifest.keys(), cache.manifest.labels(), cache.good_rows().tolist()
    assert len({keys[row] for row in rows}) == len(rows)
    for row in rows:
        assert (cache.manifest.classes or [])[labels[row]] == keys[row].split("/")[0]
        assert len({cache.content_digest(row, view) for view in range(cache.views)}) == 1
        cache.read(np.full(cache.views, row), np.arange(cache.views))


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(6))
def test_growth_at_random(
    seed: int, tmp_path: Path, teacher_files: dict[str, str],
    kill_after: Callable[[int | None], None],
) -> None:  # fmt: skip
    """Every image that can be read has its targets after a call that allows rejected ones."""
    chance, store, views = random.Random(seed), tmp_path / "t.zarr", 1
    folder = Folder(tmp_path / "data", chance)
    before: dict[str, bytes] = {}
    for _ in range(_STEPS):
        for _ in range(chance.randrange(3)):
            folder.change()
        views = min(3, views + (chance.random() < 0.08))
        allowed = chance.choice(["0", "100%", "100%"])
        kill_after(chance.randrange(9) if chance.random() < 0.4 else None)
        summary = None
        with suppress(Killed, MilanError):
            summary = extract_targets(
                str(folder.root), out=str(store), executor="local", views=views, shard_size=2,
                batch_size=3, max_bad=allowed, drop_missing=chance.random() < 0.7, **teacher_files,
            )  # fmt: skip
        kill_after(None)
        if (store / "index.json").exists():
            check(store, before)
            published = tuple(f"{entry.path}/" for entry in Index.read(store).generations)
            before = {n: d for n, d in tree(store).items() if n.startswith(published)}
        if summary and allowed == "100%":
            cache = TargetCache(store)
            keys = cache.manifest.keys()
            have = {keys[row] for row in cache.good_rows().tolist()}
            changed = {keys[row] for row, why in cache.bad.items() if why.startswith("changed")}
            want = {path.relative_to(folder.root).as_posix() for path in folder.whole()}
            assert want - changed <= have
            assert all((folder.root / key).exists() for key in have)
            assert summary["images"] == len(set(keys))
