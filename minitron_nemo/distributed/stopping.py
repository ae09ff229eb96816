"""Requests to stop: who hears them, and what comes of them.

SIGINT, SIGTERM and SIGUSR1 mean the same. Training finishes its step and saves (`finishing`); everything else ends
at once, as after Ctrl-C; a second request ends anything without touching files. A command that started ranks hears
the signal and passes the request on by a pipe; a rank of torchrun or srun hears it itself.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
STOP, END = b"stop", b"end"  # what a launcher says to a rank: when your work allows; now
ONE_REQUEST = 1.0  # seconds within which signals count as one: torchrun repeats what the terminal sends to the group
GRACE = 1.0  # seconds in which a rank that ends may remove what it was writing
INTERRUPTED = 130


class _Requests:
    """What reached this process; set by a listening thread, read by the one that works."""

    def __init__(self) -> None:
        self.first: float | None = None
        self.finishing = False
        self.asked = False
        self.leaving = threading.Event()

    def is_second(self) -> bool:
        """Count one request; whether it is not the first."""
        now = time.monotonic()
        if self.first is None:
            self.first = now
        return now - self.first > ONE_REQUEST

    def stop(self) -> None:
        """Finish where work is being finished, else leave. Not on the main thread."""
        if self.finishing:
            self.asked = True
        else:
            self.leave()

    def leave(self) -> None:
        """Interrupt the main thread, and end the process when a collective keeps it from noticing."""
        self.leaving.set()
        main = threading.main_thread().ident
        assert main is not None
        signal.pthread_kill(main, signal.SIGUSR1)  # a real signal, which also wakes from sleeping and reading
        time.sleep(GRACE)
        os._exit(INTERRUPTED)


_requests = _Requests()
_hearing: list[_Requests] = []  # what the blocks that hear signals were asked, the outermost first


@contextmanager
def finishing() -> Iterator[Callable[[], bool]]:
    """For work that stops by itself: inside, a request to stop does nothing but turn what is yielded true."""
    _requests.finishing = True
    try:
        yield lambda: _requests.asked
    finally:
        _requests.finishing = False


def is_leaving() -> bool:
    """Whether this rank was told to end; waits a moment, because its neighbors may have ended of it before."""
    return _requests.leaving.wait(0.3)


@contextmanager
def hearing(first: Callable[[], None], *, last: Callable[[], None] = lambda: None) -> Iterator[Callable[[], bool]]:
    """Call `first` on the first request by a signal; on a second call `last` and end the process with 128 + signal.

    Yields whether there was one. Does nothing but yield in other threads than the main one, which get no signals.
    """
    heard = _Requests()

    def handler(number: int, frame: FrameType | None) -> None:
        is_first = heard.first is None
        if heard.is_second():
            last()
            os._exit(128 + number)
        elif is_first:
            first()

    with _handled_by(handler, heard):
        yield lambda: heard.first is not None


@contextmanager
def interruptible() -> Iterator[None]:
    """Every request to stop is a KeyboardInterrupt, as Ctrl-C always was."""

    def interrupt() -> None:
        raise KeyboardInterrupt

    with hearing(interrupt):
        yield


@contextmanager
def obeying_signals() -> Iterator[None]:
    """A rank of torchrun or srun: signals are heard by a thread, also while the main one waits in a collective."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with _handled_by(_when_told, _requests):
        before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        threading.Thread(target=_listen_to_signals, args=(reader,), daemon=True).start()
        try:
            yield
        finally:
            signal.set_wakeup_fd(before)
            os.close(writer)


def obey(launcher: Connection) -> None:
    """A rank of a launcher: its words count, signals to the group do not, and without it this process ends."""
    for number in SIGNALS:
        signal.signal(number, _when_told)
    threading.Thread(target=_listen_to_launcher, args=(launcher,), daemon=True).start()


def _when_told(number: int, frame: FrameType | None) -> None:
    """The handler of a rank: what the listening thread decided, nothing on its own."""
    if _requests.leaving.is_set():
        raise KeyboardInterrupt


def _listen_to_signals(reader: int) -> None:
    while heard := os.read(reader, 1):
        if heard[0] not in SIGNALS:
            continue
        is_first = _requests.first is None
        if _requests.is_second():
            os._exit(128 + heard[0])
        elif is_first:
            _requests.stop()
    os.close(reader)


def _listen_to_launcher(launcher: Connection) -> None:
    while True:
        try:
            word = launcher.recv_bytes()
        except (EOFError, OSError):
            os._exit(1)  # only the launcher holds the other end: it is gone
        if word == STOP:
            _requests.stop()
        else:
            _requests.leave()


@contextmanager
def _handled_by(handler: Callable[[int, FrameType | None], None], heard: _Requests) -> Iterator[None]:
    """Signals go to `handler`; a block around this one takes a request that was heard here for one it knows."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in SIGNALS}
    _hearing.append(heard)
    try:
        yield
    finally:
        _hearing.pop()
        if _hearing and _hearing[-1].first is None:
            _hearing[-1].first = heard.first
        for number, former in before.items():
            signal.signal(number, former if former is not None else signal.SIG_DFL)
