"""Which split of a data set a file belongs to: train, validation or test, by its names.

The words, and what may stand beside them, are those of Hugging Face's `datasets`
(huggingface.co/docs/hub/datasets-file-names-and-splits). Here the names of a folder's children are
looked at together, because a class may be called `train` as well:

    train/ val/ test/                a folder cut into splits; whatever else is in it is left out
    cat/ dog/ test/                  classes, and images to test on
    bus/ car/ train/                 classes
    train-00000-of-00002.parquet     of Parquet files and tars, every such name is a split
    train_1.jpg test_1.jpg           of pictures, only if most names in the folder are of splits
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from milan.core.paths import AnyPath
from milan.errors import DataError

TRAIN, VALIDATION, TEST = "train", "validation", "test"
ALL = "all"
"""Asks for the files of all splits."""
_OTHER = "no split"
_WORDS = {
    **dict.fromkeys(("train", "training"), TRAIN),
    **dict.fromkeys(("validation", "valid", "val", "dev"), VALIDATION),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), TEST),
}
_BESIDE = "-._ 0-9"
_WORD = re.compile(f"(?:^|[{_BESIDE}])({'|'.join(_WORDS)})(?=[{_BESIDE}]|$)", re.IGNORECASE)
_NUMBERED = re.compile(r"(.+)-\d{5}-of-\d{5}\b")
"""A name of `datasets` for a split of any name: unlabeled-00000-of-00004.parquet."""


@dataclass(frozen=True)
class WantedSplit:
    """Which split a command takes."""

    name: str | None = None
    """As the user gave it, or ALL; None: the first of `defaults` that the data have."""
    defaults: tuple[str, ...] = (TRAIN,)
    flag: str = "--split"
    """The flag that names it, for messages."""


@dataclass(frozen=True)
class Splits:
    """The split of each of some files."""

    of_files: list[str | None]
    """None: no choice, the file belongs to whichever split is taken."""
    folders: frozenset[str] = frozenset()
    """The folders that are splits, and so are no classes."""

    @property
    def counts(self) -> dict[str, int]:
        """Name -> number of files; empty if there is nothing to choose from."""
        return dict(sorted(Counter(filter(None, self.of_files)).items()))


def find_splits(files: Sequence[str], *, pictures: bool) -> Splits:
    """The splits of `files`, paths as POSIX: pictures, or Parquet files and tars."""
    in_folder: dict[str, list[int]] = defaultdict(list)
    for i, file in enumerate(files):
        in_folder[file.rpartition("/")[0]].append(i)
    children: dict[str, set[str]] = defaultdict(set)
    for folder in list(in_folder):
        while folder and folder not in children[parent := folder.rpartition("/")[0]]:
            children[parent].add(folder)
            folder = parent
    of_files: list[str | None] = [None] * len(files)
    split_folders = set()
    todo: list[tuple[str, str | None]] = [("", None)]
    while todo:
        folder, outer = todo.pop()
        below, inside = sorted(children[folder]), in_folder[folder]
        of_folders, of_names = _of_children(
            [_last(child) for child in below],
            [_last(files[i]) for i in inside],
            pictures=pictures,
            within=outer is not None,
        )
        if outer not in (None, TRAIN):  # a part of the test images is still for testing
            of_folders, of_names = [None] * len(below), [None] * len(inside)
        for child, split in zip(below, of_folders, strict=True):
            todo.append((child, split or outer))
            if split:
                split_folders.add(child)
        for i, split in zip(inside, of_names, strict=True):
            of_files[i] = split or outer
    return Splits(of_files, frozenset(split_folders))


def take_split(splits: Splits, wanted: WantedSplit, where: AnyPath) -> tuple[str | None, list[int]]:
    """(name of the split that is taken, numbers of its files).

    The name is None where there is nothing to choose from. Raises DataError if the wanted split is
    not there, or none is wanted and only others are there.
    """
    counts = splits.counts
    everything = list(range(len(splits.of_files)))
    if wanted.name == ALL or not (counts or wanted.name):
        return (ALL if counts else None), everything
    if wanted.name:
        asked = _WORDS.get(wanted.name.lower(), wanted.name)
        if not counts and _word(where.name) == asked:
            return None, everything  # its own folder was named
        if asked not in counts:
            raise DataError(
                f"{where} has no split {wanted.name!r}: "
                f"it has {show_counts(counts) or 'no splits'}",
                expected="files or folders with such a name",
                fix=" or ".join(f"{wanted.flag} {name}" for name in counts)
                or f"without {wanted.flag}",
            )
        return asked, [i for i in everything if splits.of_files[i] == asked]
    name = next((default for default in wanted.defaults if default in counts), None)
    taken = [i for i in everything if splits.of_files[i] in (None, name)]
    if not taken:
        raise DataError(
            f"{where} has no split {' or '.join(wanted.defaults)}: it has {show_counts(counts)}",
            expected="to be told which images to take: others are never taken unasked",
            fix=" or ".join(f"{wanted.flag} {name}" for name in [*counts, ALL]),
        )
    return name, taken


def show_counts(counts: dict[str, int]) -> str:
    """'test 100, train 1,000 (files)'."""
    return ", ".join(f"{name} {n:,}" for name, n in counts.items()) + " (files)" * bool(counts)


def of_split(split: str | None) -> str:
    """How files of a split that was not taken are counted."""
    return f"of split {split}" if split not in (None, _OTHER) else "of no split"


def _of_children(
    folders: list[str], files: list[str], *, pictures: bool, within: bool
) -> tuple[list[str | None], list[str | None]]:
    """The splits of the folders and files in one folder, which lies `within` a split or not."""
    of_folders, of_files = _words(folders), _words(files)
    if pictures and (
        2 * sum(map(bool, of_files)) < len(files) or not _is_cut({*filter(None, of_files)})
    ):
        of_files = [None] * len(files)
    present = {*filter(None, of_folders), *filter(None, of_files)}
    if _is_cut(present):
        return (
            [split or name for split, name in zip(of_folders, folders, strict=True)],
            [split or _other(name) for split, name in zip(of_files, files, strict=True)],
        )
    if within:
        return [None] * len(folders), [None] * len(files)
    if present == {TRAIN}:
        if not all(map(_is_word, folders)):  # among others it is a class
            of_folders = [None] * len(folders)
        if any(of_folders) or any(of_files):
            of_files = [split or _other(name) for split, name in zip(of_files, files, strict=True)]
        return of_folders, of_files
    return [
        split if _is_word(name) else None for split, name in zip(of_folders, folders, strict=True)
    ], of_files


def _is_cut(present: set[str]) -> bool:
    """Whether these are the splits of one place: training images, and others beside them."""
    return TRAIN in present and len(present) > 1


def _words(names: list[str]) -> list[str | None]:
    """`_word` of each; fast where no name has one, for there may be millions."""
    text = "/".join(names).lower()
    if not any(word in text for word in _WORDS):
        return [None] * len(names)
    return [_word(name) for name in names]


def _word(name: str) -> str | None:
    """The split that a name speaks of; None if of none, or of two (`train_val`)."""
    splits = {_WORDS[word.lower()] for word in _WORD.findall(name)}
    return splits.pop() if len(splits) == 1 else None


def _is_word(name: str) -> bool:
    """Whether a name says nothing but its split: test, val2017, and not Val_Kilmer."""
    return _word(name) is not None and not _WORD.sub("", name).strip("-._ 0123456789")


def _other(name: str) -> str:
    """What a file beside those of known splits belongs to."""
    numbered = _NUMBERED.match(name)
    return numbered[1] if numbered else _OTHER


def _last(path: str) -> str:
    return path.rpartition("/")[2]
