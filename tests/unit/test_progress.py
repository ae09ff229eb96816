import contextlib
import logging
import os
import pty
import re
import subprocess
import sys

import pytest

from minitron_nemo import progress as module
from minitron_nemo.progress import duration, progress


class Clock:
    """Time that moves only when told."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def make_lines(total: float, unit: str = "step", done: float = 0, of=None) -> tuple[module._Lines, Clock, list[str]]:
    clock, lines = Clock(), []
    rate = module._RateOf(unit, of)
    reporter = module._Lines(total, "distill", rate=rate, done=done, interval=5.0, emit=lines.append, clock=clock)
    return reporter, clock, lines


def test_lines_come_at_most_once_per_interval_and_once_at_the_end():
    reporter, clock, lines = make_lines(100)
    for _ in range(100):
        clock.now += 0.5
        reporter.advance()
    reporter.finish()
    assert len(lines) == 50 // 5 + 1
    assert lines[-1].startswith("distill 100/100 100%")


def test_a_line_carries_count_rate_time_left_and_the_latest_facts():
    reporter, clock, lines = make_lines(400, unit="token")
    clock.now = 10.0
    reporter.advance(100, loss=9.0)
    clock.now = 20.0
    reporter.advance(20, loss=3.21)
    assert lines[-1] == "distill 120/400 30% 6 tokens/s 47s left loss 3.21"


def test_a_unit_made_of_others_is_named_and_rated_in_them():
    reporter, clock, lines = make_lines(400, of=(4096.0, "token"))
    clock.now = 10.0
    reporter.advance(120, loss=3.21)
    assert lines == ["distill step 120/400 30% 49.2k tokens/s 23s left loss 3.21"]


def test_what_an_earlier_run_did_counts_but_not_for_the_rate():
    reporter, clock, lines = make_lines(400, done=200)
    clock.now = 10.0
    reporter.advance(100)
    assert lines == ["distill 300/400 75% 10 steps/s 10s left"]


def test_the_final_line_is_written_when_the_loop_dies(caplog):
    caplog.set_level(logging.INFO, logger=module.__name__)

    def dying_loop():
        with progress(10, "work") as reporter:
            reporter.advance(3)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        dying_loop()
    assert "work 3/10 30%" in caplog.text


def test_other_ranks_are_silent(caplog, capsys):
    caplog.set_level(logging.INFO, logger=module.__name__)
    with progress(10, "work", enabled=False, interval=0.0) as reporter:
        reporter.advance(10, loss=1.0)
    assert caplog.text == ""
    assert capsys.readouterr() == ("", "")


def test_a_terminal_gets_a_bar(monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with progress(10, "work", unit="sample") as reporter:
        for i in range(10):
            reporter.advance(loss=float(i))
    shown = capsys.readouterr().err
    assert "work" in shown
    assert "10/10 100%" in shown
    assert "loss 9" in shown


def test_a_line_of_the_log_stands_above_the_bar_and_not_in_it():
    """A terminal of their own: the log's line is whole, and begins where a line begins."""
    code = (
        "import logging\n"
        "from minitron_nemo.progress import progress, set_up_logging\n"
        "set_up_logging(is_main=True)\n"
        "with progress(10, 'work', of=(8.0, 'token')) as bar:\n"
        "    bar.advance(4)\n"
        "    logging.getLogger('minitron_nemo').info('validation 4.13')\n"
        "    bar.advance(6)\n"
    )
    ours, theirs = pty.openpty()
    subprocess.run(
        [sys.executable, "-c", code], stderr=theirs, timeout=60, check=True, env={**os.environ, "TERM": "xterm"}
    )
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # what Linux says of a terminal without another end
        while block := os.read(ours, 65536):
            shown += block
    os.close(ours)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode()).replace("\r", "\n").splitlines()
    assert "validation 4.13" in [line.strip() for line in plain], plain
    assert any("step 10/10 100%" in line for line in plain), plain


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0s"), (59.4, "59s"), (80, "1m20s"), (11100, "3h05m"), (float("inf"), "?")]
)
def test_durations_are_short(seconds, text):
    assert duration(seconds) == text


def test_nothing_to_do_is_done():
    reporter, _, lines = make_lines(0)
    reporter.finish()
    assert lines[0].startswith("distill 0/0 100%")


def test_watched_items_come_through_unchanged_and_are_counted_when_the_next_is_asked_for(caplog):
    caplog.set_level(logging.INFO, logger="minitron_nemo")
    items = module.watched("abc", 3, "export", unit="tensor")
    assert next(items) == "a"
    assert list(items) == ["b", "c"]
    assert caplog.messages[-1].startswith("export 3/3 100%")
