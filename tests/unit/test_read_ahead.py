"""Batches are read ahead: the same ones, in the same order, while the model works."""

import threading

import pytest

from minitron_nemo.training.read_ahead import ReadAhead


def test_the_next_is_read_while_the_first_is_used():
    read, done = [], {start: threading.Event() for start in (0, 4, 8)}

    def note(start):
        read.append(start)
        done[start].set()
        return f"samples from {start}"

    with ReadAhead(note) as ahead:
        assert ahead.take(0, then=4) == "samples from 0"
        assert done[4].wait(10), "nothing is read before it is asked for"
        assert ahead.take(4, then=8) == "samples from 4"
        assert ahead.take(8) == "samples from 8"
    assert read == [0, 4, 8]


def test_what_is_asked_for_is_given_whatever_was_expected():
    with ReadAhead(lambda start: start) as ahead:
        assert [ahead.take(0, then=4), ahead.take(12, then=16), ahead.take(16)] == [0, 12, 16]


def test_an_error_is_raised_where_its_value_is_asked_for():
    def read(start):
        if start == 4:
            raise OSError("the disk is gone")
        return start

    with ReadAhead(read) as ahead:
        assert ahead.take(0, then=4) == 0
        with pytest.raises(OSError, match="the disk is gone"):
            ahead.take(4)


def test_no_thread_is_left_at_the_end():
    with ReadAhead(lambda start: start) as ahead:
        ahead.take(0, then=4)
    assert not any(thread.name.startswith("read-ahead") for thread in threading.enumerate())
