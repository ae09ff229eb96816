"""What people see of a run: log lines, and one way to show how far a long loop is.

A bar on a terminal, plain log lines anywhere else.
"""

import logging
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TextIO, TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

logger = logging.getLogger(__name__)

Fact = float | int | str
Item = TypeVar("Item")


def set_up_logging(*, is_main: bool) -> None:
    """Our lines on standard error, from one process; of the libraries, warnings only."""
    handler = _StandardError()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("minitron_nemo").setLevel(logging.INFO if is_main else logging.WARNING)
    logging.getLogger("megatron").setLevel(logging.ERROR)


class _StandardError(logging.StreamHandler[TextIO]):
    """Writes to what standard error is at that moment: under a bar, to the lines above it."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stderr


class ProgressReporter(Protocol):
    """What `progress` yields: `advance` says that `n` more units are done and carries the latest facts."""

    def advance(self, n: float = 1, **facts: Fact) -> None: ...


@contextmanager
def progress(
    total: float,
    label: str,
    *,
    unit: str = "step",
    of: tuple[float, str] | None = None,
    done: float = 0,
    enabled: bool = True,
    interval: float = 5.0,
) -> Iterator[ProgressReporter]:
    """A reporter for a loop of `total` units, closed with a final line when the block ends, also by an exception.

    A terminal gets a bar with rate, time left and the latest facts. Anything else gets log lines at most every
    `interval` seconds: a cluster's log file must stay readable. `done` units were done by an earlier run: they count,
    but not for the rate. `of`, such as `(8192.0, "token")`, says what a unit is made of: the unit is named beside its
    count, and the rate is of those. `enabled=False` is silent, for ranks other than 0.
    """
    rate = _RateOf(unit, of)
    if not enabled:
        yield _Silent()
    elif sys.stderr.isatty():
        with _Bar(total, label, rate=rate, done=done) as bar:
            yield bar
    else:
        lines = _Lines(total, label, rate=rate, done=done, interval=interval)
        try:
            yield lines
        finally:
            lines.finish()


class _RateOf:
    """How a count and a rate are written: `30/100` and `1.2 samples/s`, or `step 3/10` and `9.83k tokens/s`."""

    def __init__(self, unit: str, of: tuple[float, str] | None = None) -> None:
        self.size, self.unit = of if of is not None else (1.0, unit)
        self.named = f"{unit} " if of is not None else ""

    def count(self, done: float, total: float) -> str:
        return f"{self.named}{_count(done)}/{_count(total)} {_percent(done, total)}"

    def rate(self, units_per_second: float) -> str:
        return f"{_rate(units_per_second * self.size)} {self.unit}s/s"


class _Silent:
    def advance(self, n: float = 1, **facts: Fact) -> None:
        pass


class _Lines:
    """`student step 120/400 30% 12.3k tokens/s 3m53s left loss 3.21`"""

    def __init__(
        self,
        total: float,
        label: str,
        *,
        rate: _RateOf,
        done: float,
        interval: float,
        emit: Callable[[str], None] = logger.info,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total, self.label, self.rate, self.interval = total, label, rate, interval
        self.emit, self.clock = emit, clock
        self.before = self.done = done
        self.facts: dict[str, Fact] = {}
        self.started = self.last = clock()

    def advance(self, n: float = 1, **facts: Fact) -> None:
        self.done += n
        self.facts.update(facts)
        if self.clock() - self.last >= self.interval:
            self.last = self.clock()
            self.emit(self._line("left"))

    def finish(self) -> None:
        self.emit(self._line("total"))

    def _line(self, time_of: str) -> str:
        elapsed = self.clock() - self.started
        rate = (self.done - self.before) / elapsed if elapsed > 0 else 0.0
        seconds = elapsed if time_of == "total" else _seconds_left(self.done, self.total, rate)
        parts = [
            f"{self.label} {self.rate.count(self.done, self.total)}",
            self.rate.rate(rate),
            f"{duration(seconds)} {time_of}",
            _facts(self.facts),
        ]
        return " ".join(part for part in parts if part)


class _Bar:
    """A rich bar; log lines of the program appear above it."""

    def __init__(self, total: float, label: str, *, rate: _RateOf, done: float) -> None:
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[done]}"),
            _RateAndTime(rate, before=done),
            TextColumn("{task.fields[facts]}", markup=False),
        )
        self.total, self.rate = total, rate
        self.progress = Progress(*columns, console=Console(stderr=True), refresh_per_second=4, expand=True)
        self.task = self.progress.add_task(label, total=total, done=self._done(done), facts="")
        self.progress.update(self.task, completed=done)
        self.facts: dict[str, Fact] = {}

    def _done(self, completed: float) -> str:
        return self.rate.count(completed, self.total)

    def __enter__(self) -> "_Bar":
        self.progress.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.progress.stop()

    def advance(self, n: float = 1, **facts: Fact) -> None:
        self.facts.update(facts)
        completed = self.progress.tasks[0].completed + n
        self.progress.update(self.task, completed=completed, done=self._done(completed), facts=_facts(self.facts))


class _RateAndTime(ProgressColumn):
    """`12.3k tokens/s 1m20s left`"""

    def __init__(self, rate: _RateOf, *, before: float) -> None:
        super().__init__()
        self.rate, self.before = rate, before

    def render(self, task: Task) -> Text:
        rate = (task.completed - self.before) / task.elapsed if task.elapsed else 0.0
        left = _seconds_left(task.completed, task.total or 0, rate)
        return Text(f"{self.rate.rate(rate)} {duration(left)} left")


def duration(seconds: float) -> str:
    """`42s`, `1m20s` or `3h05m`; `?` when unknown (not finite)."""
    if seconds == float("inf"):
        return "?"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def _seconds_left(done: float, total: float, rate: float) -> float:
    return max(total - done, 0) / rate if rate > 0 else float("inf")


def _percent(done: float, total: float) -> str:
    return f"{100 * done / total:.0f}%" if total else "100%"


def _count(value: float) -> str:
    """Whole numbers as they are up to 99999, then with a suffix."""
    return f"{value:.0f}" if value < 100_000 else _rate(value)


def _rate(value: float) -> str:
    """Three significant digits with k, M, G: `12.3k`."""
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{suffix}"
    return f"{value:.3g}"


def _facts(facts: dict[str, Fact]) -> str:
    return " ".join(f"{name} {f'{value:.4g}' if isinstance(value, float) else value}" for name, value in facts.items())


def watched(items: Iterable[Item], total: int, label: str, *, unit: str) -> Iterator[Item]:
    """The same items, each counted as done when the next is asked for; closed, they are closed too."""
    with progress(total, label, unit=unit) as bar:
        try:
            for item in items:
                yield item
                bar.advance()
        finally:
            if isinstance(items, Generator):
                items.close()
