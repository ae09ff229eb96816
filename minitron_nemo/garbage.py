"""When the garbage collector works: not while modules are imported, and never on what they brought along.

That lives as long as the process, and walking it again and again takes a third of the time that importing it does.
"""

import functools
import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def put_off() -> Iterator[None]:
    """No collection while the block runs, or until `collect_from_here`."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@functools.cache
def collect_from_here() -> None:
    """What is there stays for good, what comes is collected. A second call does nothing, or garbage would stay too."""
    gc.freeze()
    gc.enable()
