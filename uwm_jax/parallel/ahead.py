"""Items that a thread makes ahead of the one who takes them, who never waits for longer than it wants to."""

from __future__ import annotations

import collections
import threading
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

CLOSE_SECONDS = 2.0  # for the item that is being made at the end

_Item = TypeVar("_Item")


class Ahead(Iterator[_Item], Generic[_Item]):
    """Iterates over `items`; a thread keeps `depth` of them ahead. What they raise is raised where the item would have
    come, and is the end of the iterator.

    A process must be able to ask for a limited time whether an item or an error has come, and to end while a read
    hangs: grain's thread prefetch offers neither (its `close` joins the thread).

    Args:
      waits_for: describes what is being read, for messages.
    """

    def __init__(self, items: Iterator[_Item], depth: int = 1, waits_for: Callable[[], str] = lambda: "data"):
        self.waits_for = waits_for
        self._depth = max(depth, 1)
        self._ready: collections.deque[Any] = collections.deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, args=(items,), name="prefetch", daemon=True)
        self._thread.start()

    def __next__(self) -> _Item:
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self._closed)
            if not self._ready:
                raise StopIteration
            item = self._ready[0]
            if isinstance(item, BaseException):
                raise item  # stays first: it is the end of the iterator
            self._ready.popleft()
            self._changed.notify_all()
        return item

    def ready(self, seconds: float) -> bool:
        """Waits at most so long for the next item, its error or the end; whether `next` would return at once."""
        with self._changed:
            return bool(self._changed.wait_for(lambda: self._ready or self._closed, seconds))

    @property
    def error(self) -> Exception | None:
        """The exception that `next` would raise, but for the iterator's end."""
        with self._changed:
            first = self._ready[0] if self._ready else None
        return first if isinstance(first, Exception) and not isinstance(first, StopIteration) else None

    def close(self) -> None:
        """Stops the thread and lets go of the items. A thread that hangs in the middle of an item is left behind."""
        with self._changed:
            self._closed = True
            self._ready.clear()
            self._changed.notify_all()
        self._thread.join(CLOSE_SECONDS)

    def _work(self, items: Iterator[_Item]) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: len(self._ready) < self._depth or self._closed)
                if self._closed:
                    return
            item: Any
            try:
                item = next(items)
            except BaseException as e:  # noqa: BLE001 - handed to the consumer, StopIteration too
                item = e
            with self._changed:
                if self._closed:
                    return
                self._ready.append(item)
                self._changed.notify_all()
            if isinstance(item, BaseException):
                return
