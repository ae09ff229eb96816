"""A run that hangs says so: which rank is in which step, and where in the program."""

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from minitron_nemo.distributed.groups import Groups

logger = logging.getLogger(__name__)
PACKAGE = str(Path(__file__).resolve().parents[1])


@contextmanager
def watching(step: Callable[[], int], *, groups: Groups, seconds: float) -> Iterator[None]:
    """While the block runs, warn every `seconds` in which `step` (the number of steps done) has not changed.

    A thread of every rank looks at its own rank. A rank that is stopped or gone is the one that says nothing.
    """
    ended = threading.Event()
    worker = threading.get_ident()

    def watch() -> None:
        done, since = step(), time.monotonic()
        warned = 0
        while not ended.wait(min(seconds / 4, 10)):
            if (now := step()) != done:
                done, since, warned = now, time.monotonic(), 0
            silent = time.monotonic() - since
            if silent >= seconds * (warned + 1):
                warned = int(silent // seconds)
                logger.warning(
                    f"rank {groups.rank} of {groups.layout.world_size}: no step has finished for {silent:.0f} s; it is "
                    f"in step {done + 1}, {_place(worker)}; a rank that does not say so is stopped or gone"
                )

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _place(thread: int) -> str:
    """The innermost line of this package that a thread is in."""
    frame = sys._current_frames().get(thread)
    while frame is not None and not frame.f_code.co_filename.startswith(PACKAGE):
        frame = frame.f_back
    if frame is None:
        return "outside the program"
    return f"at {Path(frame.f_code.co_filename).relative_to(PACKAGE)}:{frame.f_lineno} ({frame.f_code.co_name})"
