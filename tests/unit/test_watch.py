"""A training run whose steps do not finish says where it is, and one whose steps do says nothing."""

import itertools
import logging
import re
import time

from minitron_nemo.distributed.groups import Groups
from minitron_nemo.distributed.layout import Layout
from minitron_nemo.training.watch import watching

WARN_AFTER = 0.2


def warnings(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def test_a_rank_in_a_step_that_does_not_end_names_itself_and_the_step_again_and_again(caplog):
    with watching(lambda: 16, groups=Groups(Layout(tp=2), rank=1), seconds=WARN_AFTER):
        time.sleep(4.5 * WARN_AFTER)
    lines = warnings(caplog)
    assert 2 <= len(lines) <= 4
    assert all(re.search(r"^rank 1 of 2: no step has finished for \d+ s; it is in step 17, ", line) for line in lines)


def test_the_line_says_where_in_the_program_it_hangs(caplog):
    stuck = Groups()
    object.__setattr__(stuck, "layout", StuckLayout())
    with watching(lambda: 0, groups=Groups(), seconds=WARN_AFTER):
        stuck.barrier()
    assert "it is in step 1, at distributed/groups.py:" in warnings(caplog)[0]
    assert "(barrier)" in warnings(caplog)[0]


class StuckLayout:
    @property
    def world_size(self):
        time.sleep(2 * WARN_AFTER)
        return 1


def test_steps_that_finish_are_not_warned_of(caplog):
    steps = itertools.count()
    with watching(lambda: next(steps), groups=Groups(), seconds=WARN_AFTER):
        time.sleep(3 * WARN_AFTER)
    assert warnings(caplog) == []
