"""Work done by a pool of threads a little ahead of whoever uses its results."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from itertools import islice
from typing import Any, Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class Ahead(Generic[Item, Result]):
    """Iterates over `function` of each of `items`, in their order; a `pool` computes it.

    At most `count` results are computed before they are asked for; the first of them begin at once.
    A `with` drops those that are not used. An error is raised where its result would come.
    """

    def __init__(
        self, function: Callable[[Item], Result], items: Iterable[Item], pool: Executor, count: int
    ) -> None:
        self._items = (pool.submit(function, item) for item in items)
        self._pending: deque[Future[Result]] = deque(islice(self._items, max(1, count)))

    def __iter__(self) -> Iterator[Result]:
        return self

    def __next__(self) -> Result:
        if not self._pending:
            raise StopIteration
        result = self._pending.popleft().result()
        self._pending.extend(islice(self._items, 1))
        return result

    def __enter__(self) -> Ahead[Item, Result]:
        return self

    def __exit__(self, *_: Any) -> None:
        while self._pending:
            self._pending.pop().cancel()
