"""Reading what will be asked for next while the model works on what is there."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, TypeVar

T = TypeVar("T")


class ReadAhead(Generic[T]):
    """`read(start)` by a thread of its own, one call ahead; a context, after which nothing is read any more.

    An error of the thread is raised where its value is asked for.
    """

    def __init__(self, read: Callable[[int], T]) -> None:
        self._read = read
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
        self._waiting: tuple[int, Future[T]] | None = None

    def take(self, start: int, *, then: int | None = None) -> T:
        """What `read(start)` gives; begins with `read(then)`, which is expected to be asked for next."""
        waiting, self._waiting = self._waiting, None
        if waiting is not None and waiting[0] == start:
            value = waiting[1].result()
        else:
            value = self._thread.submit(self._read, start).result()
        if then is not None:
            self._waiting = (then, self._thread.submit(self._read, then))
        return value

    def __enter__(self) -> "ReadAhead[T]":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)
