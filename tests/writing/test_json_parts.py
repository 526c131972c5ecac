"""Files of a store that are JSON, but not what was written: one line, or the shard again."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

import pytest
from helpers import json_changes

from milan.errors import CacheError, MilanError
from milan.store.cache import TargetCache
from milan.store.format import GENERATION, INDEX, read_group, record_name
from pipeline.teachers.spec import TeacherSpec
from pipeline.writing.shard_table import ShardTable


def test_an_index_without_its_parts(copy: Path, store: Path) -> None:
    """Its digest notices every change; of one from before digests nothing is believed unseen."""
    whole = json.loads((copy / INDEX).read_text())
    (entry,) = whole["generations"]
    old = {key: value for key, value in whole.items() if key != "digest"}
    changed = [whole | {"generations": [other]} for other in json_changes(entry)]
    changed += [old | {"generations": [other]} for other in json_changes(entry)]
    for index in changed + json_changes(whole) + json_changes(old):
        (copy / INDEX).write_text(json.dumps(index))
        try:
            TargetCache(copy)
        except CacheError:
            continue
        assert index.get("digest") is None, "a change that the digest did not notice"
    (copy / INDEX).write_text(json.dumps(old))
    assert TargetCache(copy).digest == TargetCache(store).digest


def test_the_small_files_without_their_parts(copy: Path) -> None:
    """zarr.json has a digest in the index; origin.json, which has none, has to have its parts."""
    for name in ("zarr.json", "origin.json"):
        path = copy / GENERATION / name
        whole = json.loads(path.read_text())
        changed = json_changes(whole)
        for other in json_changes(whole.get("attributes", {})) if name == "zarr.json" else ():
            changed.append(whole | {"attributes": other})
        for value in changed:
            path.write_text(json.dumps(value))
            if name == "zarr.json":
                with pytest.raises(CacheError):
                    TargetCache(copy)
                continue
            with suppress(MilanError):  # and nothing else
                TargetCache(copy).find_data_root()
                TeacherSpec.recorded(TargetCache(copy).generations[0].origin["teacher"])
        path.write_text(json.dumps(whole))


def test_a_record_without_its_parts_is_no_shard(copy: Path) -> None:
    """Of a store that is not finished: such a shard is written again."""
    root = copy / GENERATION
    (root / "shards.parquet").unlink()
    spec, _ = read_group(root)
    path = root / "records" / record_name(1, 0)
    whole = json.loads(path.read_text())
    harmless = [whole | {"bad": {}}]
    for value in json_changes(whole):
        path.write_text(json.dumps(value))
        table = ShardTable(spec)
        table.read_records(root)
        assert table.missing()[1, 0] or value in harmless, value
        assert table.missing().sum() <= 1
        assert not table.reasons
