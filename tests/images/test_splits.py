"""Splits: which files are for training and which never are, unless somebody asks."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import Notes, run_here

from milan.errors import DataError
from milan.evaluation.config import EvaluationConfig
from milan.evaluation.splits import open_splits
from milan.images.manifest import Manifest, build_manifest, describe_source
from milan.images.splits import TEST, VALIDATION, WantedSplit, find_splits

CASES = Path(__file__).parent.parent / "cases"

# What a folder holds (a letter stands for each file), and what of it is taken by default.
FOLDERS = {
    "splits beside each other": ("train/c/a train/d/b val/c/x test/x", "ab"),
    "other spellings": ("Training/c/a Testing/c/x dev/c/x", "ab"[:1]),
    "years": ("train2014/a train2017/b val2014/x test2017/x", "ab"),
    "with other words": ("Final_Training/c/a Final_Test/x", "a"),
    "a part of another name": ("train/a test/x extra/x", "a"),
    "a picture beside them": ("train/c/a val/c/x x", "a"),
    "train alone": ("train/c/a train/d/b", "ab"),
    "train alone beside a picture": ("train/c/a x", "a"),
    "train among classes": ("train/a bus/b car/c", "abc"),
    "a class of that name below": ("train/c/a train/test/b test/x", "ab"),
    "classes and test images": ("cat/a dog/b test/x valid/x", "ab"),
    "names of people": ("Val_Kilmer/a Dev_Patel/b", "ab"),
    "words inside words": ("trained/a contest/b evaluations/c", "abc"),
    "two words in one": ("train_val/a cat/b", "ab"),
    "below classes": ("bottle/train/good/a bottle/test/x screw/train/good/b screw/test/x", "ab"),
    "below a class only": ("a b/train/c b/test/x", "ac"),
    "one in another": ("training/train/a training/val/x", "a"),
    "in the test images": ("test/train/x train/a", "a"),
}
NAMES = {
    "numbered": ("data/train-00000-of-00002 data/train-00001-of-00002 data/test-00000-of-00001",
                 "data/train-00000-of-00002 data/train-00001-of-00002"),
    "other names beside them": ("train-00000-of-00001 unlabeled-00000-of-00001 x",
                                "train-00000-of-00001"),
    "somewhere in the name": ("set-train-0000 set-train-0001 set-validation-00 test1",
                              "set-train-0000 set-train-0001"),
    "no train": ("a b test", "a b"),
    "per folder": ("en/train en/test fr/train fr/dev", "en/train fr/train"),
    "no splits": ("0000 0001 part-00000-of-00002", "0000 0001 part-00000-of-00002"),
    "of another folder": ("cats/0 dogs/0 test/0", "cats/0 dogs/0"),
}  # fmt: skip


def fill(root: Path, text: str) -> Path:
    """Pictures below `root`: their content is the last letter of their name."""
    for i, name in enumerate(text.split()):
        path = root / f"{name[:-1]}{name[-1]}{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name[-1])
    return root


def letters(manifest: Manifest) -> str:
    paths = [manifest.root / path for path in manifest.table["path"].to_pylist()]
    return "".join(sorted(path.read_text() for path in paths))


@pytest.mark.parametrize("case", FOLDERS)
def test_folders(tmp_path: Path, case: str) -> None:
    """Of pictures. What is left out is counted, and `all` takes everything."""
    text, taken = FOLDERS[case]
    manifest = build_manifest(fill(tmp_path, text), seed=0)
    assert letters(manifest) == taken
    assert manifest.listing is not None
    assert sum(manifest.listing.ignored.values()) == len(text.split()) - len(taken)
    everything = build_manifest(tmp_path, seed=0, split=WantedSplit("all"))
    assert len(everything) == len(text.split())


@pytest.mark.parametrize("case", NAMES)
@pytest.mark.parametrize("extension", [".parquet", ".tar"])
def test_file_names(case: str, extension: str) -> None:
    """Of Parquet files and tars: every such name is a split's, also alone."""
    text, taken = NAMES[case]
    files = [f"{name}{extension}" for name in text.split()]
    splits = find_splits(files, pictures=False)
    kept = [f for f, s in zip(files, splits.of_files, strict=True) if s in (None, "train")]
    assert kept == [f"{name}{extension}" for name in taken.split()]


def test_names_of_pictures() -> None:
    """They count only where most of a folder's have one, and both kinds are there."""

    def of(text: str) -> list[str | None]:
        return find_splits(text.split(), pictures=True).of_files

    assert of("COCO_train2014_1.jpg COCO_val2014_2.jpg") == ["train", "validation"]
    assert of("c/train_1.jpg c/test_2.jpg c/3.jpg d/test.jpg") == [
        "train", "test", "no split", None
    ]  # fmt: skip
    for text in ("test_1.jpg test_2.jpg", "train.jpg test.jpg 1.jpg 2.jpg 3.jpg", "train_1.jpg"):
        assert set(of(text)) == {None}


def test_parquet_files() -> None:
    """As Hugging Face lays them out: counted, said, and another is taken if asked."""

    def keys(manifest: Manifest) -> set[str]:
        return {key.rpartition("/")[2] for key in manifest.table["key"].to_pylist()}

    data = CASES / "07-hf-splits-in-file-names"
    expected = {None: set("0123"), "val": set("67"), "TEST": set("45"), "all": set("01234567")}
    for name, digits in expected.items():
        manifest = build_manifest(data, seed=0, split=WantedSplit(name))
        assert keys(manifest) == {f"{digit}.png" for digit in digits}
    manifest = build_manifest(data, seed=0)
    assert describe_source(manifest)[1:] == [
        "split: train, of test 1, train 1, validation 1 (files); --split NAME takes another, "
        "--split all takes all",
        "found: 3 files: 1 .parquet; left out: 1 of split test, 1 of split validation",
    ]
    wanted = WantedSplit(None, (VALIDATION, TEST), "--val-split")
    assert keys(build_manifest(data, seed=0, split=wanted)) == {"6.png", "7.png"}
    file = data / "data/test-00000-of-00001.parquet"  # named itself: asked
    assert keys(build_manifest(file, seed=0)) == {"4.png", "5.png"}
    assert len(build_manifest(file, seed=0, split=WantedSplit("test"))) == 2
    with pytest.raises(DataError, match=r"no split 'train': it has test 1"):
        build_manifest(file, seed=0, split=WantedSplit("train"))


def test_members_of_tars(tmp_path: Path) -> None:
    """A tar of the whole set has its splits as folders."""
    for tar in ("a", "b"):
        with tarfile.open(tmp_path / f"{tar}.tar", "w") as archive:
            for name in ("train/c/1.jpg", "train/c/1.cls", "val/c/2.jpg", "test/3.jpg"):
                member = tarfile.TarInfo(name)
                member.size = 1
                archive.addfile(member, io.BytesIO(b"1"))
    for source, tars in ((tmp_path, "ab"), (tmp_path / "a.tar", "a")):
        manifest = build_manifest(source, seed=0)
        expected = [f"{tar}.tar/train/c/1.jpg" for tar in tars]
        assert sorted(manifest.table["key"].to_pylist()) == expected
        assert manifest.labels().tolist() == [1] * len(tars)
        n = len(tars)
        assert describe_source(manifest)[2] == (
            f"found: {5 * n} files: {n} .tar, {n} images, {n} labels and captions; "
            f"left out: {n} of split test, {n} of split validation"
        )
        assert len(build_manifest(source, seed=0, split=WantedSplit("all"))) == 3 * n
        for name in ("test", "val"):
            assert len(build_manifest(source, seed=0, split=WantedSplit(name))) == n
    with pytest.raises(DataError, match=r"no split 'x'"):
        build_manifest(tmp_path, seed=0, split=WantedSplit("x"))


def test_test_images_are_never_taken_unasked(tmp_path: Path) -> None:
    """Where nothing else is there, the line says what to type; so it does for a wrong name."""
    fill(tmp_path / "f", "test/c/a val/c/b")
    with pytest.raises(DataError, match=r"no split train: it has test 1, validation 1") as error:
        build_manifest(tmp_path / "f", seed=0)
    assert error.value.fix == "--split test or --split validation or --split all"
    with pytest.raises(DataError, match=r"no split 'tset': it has test 1") as error:
        build_manifest(tmp_path / "f", seed=0, split=WantedSplit("tset"))
    assert error.value.fix == "--split test or --split validation"
    with pytest.raises(DataError, match=r"no split 'train': it has no splits") as error:
        build_manifest(tmp_path / "f/val", seed=0, split=WantedSplit("train"))
    assert error.value.fix == "without --split"
    assert letters(build_manifest(tmp_path / "f/val", seed=0)) == "b"
    assert letters(build_manifest(tmp_path / "f/val", seed=0, split=WantedSplit("val"))) == "b"
    pq.write_table(pa.table({"image": [{"bytes": b"1", "path": "x"}]}), tmp_path / "test.parquet")
    with pytest.raises(DataError, match=r"no split train: it has test 1"):
        build_manifest(tmp_path, seed=0)


def test_splits_are_no_classes(tmp_path: Path) -> None:
    """The class is the folder beside or below; one split folder is the root, as it was."""
    manifest = build_manifest(fill(tmp_path / "a", "train/c/a train/d/b val/c/x"), seed=0)
    assert (manifest.root, manifest.classes) == (tmp_path / "a/train", ["c", "d"])
    everything = build_manifest(tmp_path / "a", seed=0, split=WantedSplit("all"))
    assert everything.classes == ["c", "d"]
    manifest = build_manifest(fill(tmp_path / "b", "train1/c/a train2/c/b train2/d/e"), seed=0)
    assert (manifest.root, manifest.classes) == (tmp_path / "b", ["c", "d"])
    manifest = build_manifest(fill(tmp_path / "c", "p/train/q/a p/test/q/x r/train/q/b"), seed=0)
    assert manifest.classes == ["p", "r"]
    manifest = build_manifest(fill(tmp_path / "d", "train1/a train2/b"), seed=0)
    assert manifest.classes is None


def test_commands_take_a_split(tmp_path: Path, teacher_files: dict[str, str]) -> None:
    """By flag, by parameter file, and in a plan; each says what it has taken."""
    data = CASES / "07-hf-splits-in-file-names"
    (tmp_path / "p.yaml").write_text(f"extract: {{data: {data}, split: val}}")
    small = [part for name, value in teacher_files.items() for part in (f"--{name}", value)]
    small += ["--views", 1, "--executor", "local"]
    for arguments, images in (
        (["--data", data, "--out", "a.zarr"], 4),
        (["--params", "p.yaml", "--out", "b.zarr"], 2),
        (["--params", "p.yaml", "--split", "all", "--out", "c.zarr"], 8),
        (["--data", data, "--out", "a.zarr"], 4),
    ):
        ran = run_here("extract-targets", *arguments, *small, cwd=tmp_path)
        assert (ran.code, ran.err) == (0, "")
        assert f"manifest: {images} images" in ran.out.splitlines()
        assert "of test 1, train 1, validation 1 (files)" in ran.out
    ran = run_here("extract-targets", "--data", data, "--out", "c.zarr", *small, cwd=tmp_path)
    assert (ran.code, "4 of the 8 images" in ran.err, "--split all" in ran.err) == (1, True, True)
    ran = run_here("plan", "--data", data, "--split", "tset", *small, cwd=tmp_path)
    assert ran.code == 1
    assert "has no split 'tset'" in ran.err


def test_probes_take_a_split(tmp_path: Path) -> None:
    """What is fitted on is the training part, what is measured on never is."""
    fill(tmp_path, "train/c/a train/d/b val/c/u val/d/v test/c/x")

    def parts(**settings: str) -> tuple[str, str]:
        notes = Notes()
        config = EvaluationConfig(data=str(tmp_path), **settings)
        told = []
        for split in open_splits(config, notes):
            files = [split.of.images.read(int(row)).decode() for row in split.rows]
            told.append("".join(sorted(files)))
        assert sum(line.startswith("split: ") for line in notes.lines) == 2
        return told[0], told[1]

    assert parts(val_data=str(tmp_path)) == ("ab", "uv")
    assert parts(val_data=str(tmp_path), val_split="test") == ("ab", "x")
    assert parts(split="val", val_data=str(tmp_path), val_split="test") == ("uv", "x")
    only = EvaluationConfig(data=str(tmp_path), val_data=str(fill(tmp_path / "o", "train/c/a")))
    with pytest.raises(DataError, match="no split validation or test: it has train 1") as error:
        open_splits(only)
    assert error.value.fix == "--val-split train or --val-split all"
