import logging

import pytest

from minitron_nemo import progress as module
from minitron_nemo.progress import duration, progress


class Clock:
    """Time that moves only when told."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def make_lines(total: float, unit: str = "step", done: float = 0) -> tuple[module._Lines, Clock, list[str]]:
    clock, lines = Clock(), []
    reporter = module._Lines(total, "distill", unit=unit, done=done, interval=5.0, emit=lines.append, clock=clock)
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
