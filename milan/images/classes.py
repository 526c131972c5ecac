"""A class number means one class: numbers of several parts refer to one table of class names."""

from __future__ import annotations

import unicodedata

import pyarrow as pa
import pyarrow.compute as pc

from milan.errors import DataError


def class_name(text: str) -> str:
    """A class's name in the composed form of Unicode (NFC): as another system writes the same
    letters, `é` may be two characters, and would be a second class.
    """
    return unicodedata.normalize("NFC", text)


class ClassTable:
    """The names of class numbers, shared by all parts of a data set or store.

    It only grows: a number that was given keeps its class.
    """

    def __init__(self, names: list[str] | None = None) -> None:
        self.names = list(names or [])
        self._kinds: dict[str, str] = {}  # names, numbers: the first part with such labels

    def renumbered(self, rows: pa.Table, names: list[str] | None, where: str) -> pa.Table:
        """Rows with a column `label`, whose numbers become those of this table. See `add`."""
        labels = self.add(rows["label"], names, where)
        return rows.set_column(rows.schema.get_field_index("label"), "label", labels)

    def add(self, labels: pa.ChunkedArray, names: list[str] | None, where: str) -> pa.ChunkedArray:
        """`labels` (int32; null or negative: unknown) of a part, as numbers of this table.

        Classes that are new come last. `names` are the part's own: labels without names stay as
        they are. `where` names the part in errors. Raises DataError for a number without a class,
        for numbers beside names, and for tables that cannot be matched because a name in them
        stands for two classes.
        """
        largest = pc.max(labels).as_py()
        labelled = largest is not None and largest >= 0
        if labelled and names is not None and largest >= len(names):
            raise DataError(
                f"{where} has an image of class {largest} and names of {len(names)} classes",
                expected="a name for every class number",
                fix="write the file with all class names, or without a column `label`",
            )
        kinds = {**self._kinds}  # an error leaves the table as it was
        if labelled:
            kinds.setdefault("numbers" if names is None else "names", where)
        if len(kinds) == 2:
            raise DataError(
                f"{kinds['names']} has class names, {kinds['numbers']} has class numbers alone",
                expected="names of all classes, or of none: a number means nothing to the other",
                fix="write class names to both, or leave the labels of one out",
            )
        self._kinds = kinds
        if names is None:
            return labels
        shared = min(len(names), len(self.names))
        if names[:shared] == self.names[:shared]:  # the same numbers, and perhaps more of them
            self.names += names[shared:]
            return labels
        for table in (names, self.names):
            if len(set(table)) < len(table):
                twice = next(name for name in table if table.count(name) > 1)
                raise DataError(
                    f"class {twice!r} has two numbers, and {where} numbers the classes differently",
                    expected="a name of its own for every class, or one order of names throughout",
                )
        number = {name: i for i, name in enumerate(self.names)}
        for name in names:
            number.setdefault(name, len(number))
        self.names = list(number)
        numbers = pa.array([number[name] for name in names], pa.int32())
        known = pc.if_else(pc.greater_equal(labels, 0), labels, pa.scalar(None, pa.int32()))
        return pc.take(numbers, known)
