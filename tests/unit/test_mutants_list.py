"""The faults of tests/mutants are faults still: their text stands in the sources, their tests are there."""

import shlex

import pytest
from mutants.fault import Fault
from mutants.listed import FAULTS
from tiny_run import ROOT

SHELL = (".sh", ".sbatch")


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_the_text_of_a_fault_stands_once_and_is_replaced_by_another_that_parses(fault: Fault):
    text = (ROOT / fault.file).read_text(encoding="utf-8")
    assert text.count(fault.find) == 1
    changed = text.replace(fault.find, fault.replace)
    assert changed != text
    if not fault.file.endswith(SHELL):
        compile(changed, fault.file, "exec")
    paths = [word for word in shlex.split(fault.tests) if word.startswith("tests/")]
    assert paths
    assert all((ROOT / path).is_file() for path in paths), paths


def test_there_are_at_least_sixty_and_no_two_are_the_same():
    assert len(FAULTS) >= 60
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)
    assert len({(fault.file, fault.find, fault.replace) for fault in FAULTS}) == len(FAULTS)
