"""Batches put on the devices ahead of their step, by a thread."""

from collections.abc import Callable, Iterator
import contextlib
import queue
import threading
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Prefetch(Generic[T]):
    """An iterator over ``put(item)`` for each item of another, a few items ahead of who asks.

    An error of the other iterator is raised where its item would have come. ``close`` ends the thread and the other
    iterator; leaving a ``with`` does so too.
    """

    def __init__(self, items: Iterator[Any], put: Callable[[Any], T], depth: int):
        """Starts the thread.

        Args:
          items: the other iterator; closed if it has ``close``.
          put: what is done with each item in the thread.
          depth: how many results wait at most.
        """
        self._items, self._put = items, put
        self._ready: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(max(1, depth))
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="prefetch", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            for item in self._items:
                self._offer((self._put(item), None))
                if self._closed.is_set():
                    return
            self._offer((None, StopIteration()))
        except BaseException as error:  # Told to who waits for the item.
            self._offer((None, error))

    def _offer(self, result: tuple[T | None, BaseException | None]) -> None:
        while not self._closed.is_set():
            with contextlib.suppress(queue.Full):
                return self._ready.put(result, timeout=0.1)

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        return self.get()

    def get(self, timeout: float | None = None) -> T:
        """The next result; ``queue.Empty`` where there is none within ``timeout`` seconds."""
        value, error = self._ready.get(timeout=timeout)
        if error is not None:
            self._ready.put((None, error))  # For who asks again.
            raise error
        return value

    def __enter__(self) -> "Prefetch[T]":
        return self

    def __exit__(self, *unused) -> None:
        self.close()

    def close(self) -> None:
        """Ends the thread and closes what it reads from."""
        self._closed.set()
        self._thread.join()
        if hasattr(self._items, "close"):
            self._items.close()
