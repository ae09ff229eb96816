"""Put each fault of the lists beside this file into a copy of the checkout and run the tests that should notice.

    python tests/mutants/run.py [--only SUBSTRING] [--after N] [--list] [--jobs N] [--proven]

A fault is killed when its tests fail with it; that they pass without it is for `make test` to say, or for `--proven`
here. Exit code 1 when one survives, is stale (its text is not in its file exactly once, or there are no such tests),
or is unproven (its tests fail without it too).
"""

import argparse
import importlib
import multiprocessing
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import types
import warnings
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import NoReturn

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from mutants.fault import Fault  # noqa: E402
from mutants.listed import FAULTS  # noqa: E402

PATIENCE = 300  # seconds for the tests of one fault; one that makes them hang is noticed too
KILLED, SURVIVED, STALE, UNPROVEN = "killed", "SURVIVED", "STALE", "UNPROVEN"

# What tests need and is not ours: imported once, and there in every fork.
FOREIGN = (
    "torch", "hypothesis", "hydra", "matplotlib.pyplot", "megatron.core.models.gpt.gpt_model",
    "megatron.core.optimizer", "rich.progress", "tokenizers", "transformers.models.llama.modeling_llama",
)  # fmt: skip


class NoSuchTestsError(Exception):
    """A selection of tests that selects none."""


class Copy:
    """A copy of the checkout, for one fault at a time: what git knows or would add."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        listed = ["git", "-C", str(ROOT), "ls-files", "-coz", "--exclude-standard"]
        names = subprocess.run(listed, capture_output=True, check=True, text=True).stdout.split("\0")
        for name in filter(None, names):
            source = ROOT / name
            if source.is_file() and not source.is_symlink():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, folder / name)
        self.passes_alone = cache(self.passes)

    def judge(self, fault: Fault, *, proven: bool) -> str:
        """The verdict."""
        file = self.folder / fault.file
        text = file.read_text(encoding="utf-8") if file.is_file() else ""
        if text.count(fault.find) != 1:
            return STALE
        file.write_text(text.replace(fault.find, fault.replace), encoding="utf-8")
        try:
            survived = self.passes(fault.tests)
        except NoSuchTestsError as error:
            return f"{STALE}: pytest {fault.tests}: {error}"
        finally:
            file.write_text(text, encoding="utf-8")
        if survived:
            return SURVIVED
        return UNPROVEN if proven and not self.passes_alone(fault.tests) else KILLED

    def passes(self, tests: str) -> bool:
        """Whether these tests pass here. Raises NoSuchTestsError with the last line of pytest where it finds none."""
        with tempfile.TemporaryDirectory() as temp:
            output = Path(temp, "output")
            process = os.fork()
            if not process:
                self._run(tests, output)
            try:
                code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process, signal.SIGKILL)  # ranks that a test left behind are in its session
            if code in (pytest.ExitCode.USAGE_ERROR, pytest.ExitCode.NO_TESTS_COLLECTED):
                raise NoSuchTestsError((output.read_text().splitlines() or ["no word of pytest's"])[-1])
        return code == pytest.ExitCode.OK

    def _run(self, tests: str, output: Path) -> NoReturn:
        """What a process that is a fork of this one does instead: pytest in this copy, as if started for it alone."""
        code = 1
        try:
            os.setsid()
            signal.alarm(PATIENCE)
            with output.open("w") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            os.chdir(self.folder)
            # No bytecode: two faults of one file may have the same size and second.
            os.environ.update(PYTHONPATH=str(self.folder), PYTHONDONTWRITEBYTECODE="1")
            sys.dont_write_bytecode = True
            sys.path[:2] = [str(self.folder)]  # in place of the checkout's tests/ and of this file's folder
            for name in [name for name in sys.modules if name.partition(".")[0] == "mutants"]:
                del sys.modules[name]
            sys.modules["__main__"] = types.ModuleType("__main__")  # else every rank imports this file
            options = ["-x", "-q", "-p", "no:cacheprovider", f"--basetemp={output.parent}/run"]
            code = pytest.main([*options, *shlex.split(tests)])
            sys.stdout.flush()
        finally:
            os._exit(code)


def _prepare(folder: str) -> None:
    """Each process of the pool: a copy of its own."""
    global _copy
    _copy = Copy(Path(tempfile.mkdtemp(dir=folder)))


def _judge(fault: Fault, proven: bool) -> tuple[str, float]:
    """(verdict, seconds)"""
    started = time.monotonic()
    return _copy.judge(fault, proven=proven), time.monotonic() - started


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="faults with this text in file, description or tests")
    parser.add_argument("--after", type=int, default=0, metavar="N", help="leave out the first N of them")
    parser.add_argument("--list", action="store_true", help="name the faults and run nothing")
    parser.add_argument("--jobs", type=int, default=2, help="faults at a time")
    parser.add_argument("--proven", action="store_true", help="run the tests without the fault as well")
    options = parser.parse_args()
    chosen = [fault for fault in FAULTS if options.only.lower() in f"{fault.name} {fault.tests}".lower()][
        options.after :
    ]
    if not chosen:
        parser.error(f"--only {options.only!r}: none of {len(FAULTS)} faults")
    if options.list:
        print(*(fault.name for fault in chosen), sep="\n")
        return 0
    started, verdicts = time.monotonic(), Counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in FOREIGN:
            importlib.import_module(name)
    fork = multiprocessing.get_context("fork")
    with (
        tempfile.TemporaryDirectory(prefix="mutants-") as temp,
        ProcessPoolExecutor(options.jobs, fork, _prepare, (temp,)) as pool,
    ):
        results = zip(chosen, pool.map(_judge, chosen, [options.proven] * len(chosen)), strict=True)
        for number, (fault, (verdict, seconds)) in enumerate(results, start=1):
            verdicts[verdict.partition(":")[0]] += 1
            print(f"[{number}/{len(chosen)}] {verdict:<8} {seconds:4.0f} s  {fault.name}", flush=True)
    minutes = (time.monotonic() - started) / 60
    print(f"{len(chosen)} faults in {minutes:.0f} min: " + ", ".join(f"{n} {name}" for name, n in verdicts.items()))
    return int(verdicts[KILLED] != len(chosen))


if __name__ == "__main__":
    sys.exit(main())
