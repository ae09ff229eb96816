"""The garbage collector rests while modules are imported, and works when a step does."""

import gc
import subprocess
import sys

from tiny_run import ROOT

from minitron_nemo.cli import run_safely
from minitron_nemo.errors import UserError
from minitron_nemo.garbage import put_off

SCRIPT = """
import gc
from minitron_nemo.cli import leave, run_safely
from minitron_nemo.garbage import collect_from_here

def command():
    assert not gc.isenabled()
    held = [[] for _ in range(5000)]
    collect_from_here()
    assert gc.isenabled()
    frozen = gc.get_freeze_count()
    assert frozen > 5000
    held += [[] for _ in range(5000)]
    collect_from_here()
    assert gc.get_freeze_count() <= frozen, "what comes later can still be collected"

code = run_safely(command)
assert gc.isenabled()
leave(code)
"""


def test_a_command_collects_nothing_until_its_step_starts_and_then_what_comes():
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_collector_works_again_after_a_command_that_fails():
    def refused():
        assert not gc.isenabled()
        raise UserError("no")

    assert gc.isenabled()
    assert run_safely(refused) == 2
    assert gc.isenabled()
    gc.disable()
    try:
        with put_off():
            pass
        assert not gc.isenabled(), "who had turned it off has it so"
    finally:
        gc.enable()


def test_what_the_fork_server_imports_is_not_walked():
    from minitron_nemo.distributed.launch import PRELOADED

    code = f"import importlib, gc\nfor name in {PRELOADED[:2]!r}: importlib.import_module(name)\nprint(gc.isenabled())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
