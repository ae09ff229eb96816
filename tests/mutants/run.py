"""Put each fault of the lists beside this file into a copy of the checkout and run the tests that should notice.

    python tests/mutants/run.py [--only SUBSTRING] [--after N] [--list] [--jobs N] [--unproven]

A fault is killed when its tests fail with it and pass without it. Exit code 1 when one survives, is stale (its text
is not in its file exactly once, or there are no such tests), or is unproven (its tests fail without it too).
"""

import argparse
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from mutants.fault import Fault  # noqa: E402
from mutants.listed import FAULTS  # noqa: E402

PATIENCE = 300  # seconds for the tests of one fault; one that makes them hang is noticed too
KILLED, SURVIVED, STALE, UNPROVEN = "killed", "SURVIVED", "STALE", "UNPROVEN"


def copy_checkout(target: Path) -> Path:
    """What git knows or would add, in a folder of its own."""
    listed = ["git", "-C", str(ROOT), "ls-files", "-coz", "--exclude-standard"]
    names = subprocess.run(listed, capture_output=True, check=True, text=True).stdout.split("\0")
    for name in filter(None, names):
        source = ROOT / name
        if source.is_file() and not source.is_symlink():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target / name)
    return target


def passes(tests: str, checkout: Path) -> bool:
    """Whether these tests pass there. Raises NoSuchTestsError with the last line of pytest where it finds none."""
    # No bytecode: two faults of one file may have the same size and second.
    environment = {**os.environ, "PYTHONPATH": str(checkout), "PYTHONDONTWRITEBYTECODE": "1"}
    with tempfile.TemporaryDirectory() as temp, Path(temp, "output").open("w+") as output:
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", f"--basetemp={temp}/run"]
        process = subprocess.Popen(
            [*command, *shlex.split(tests)], cwd=checkout, env=environment, start_new_session=True,
            stdout=output, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            code = process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            code = 1
        finally:
            try:
                os.killpg(process.pid, signal.SIGKILL)  # ranks that a test left behind are in its session
            except ProcessLookupError:
                process.wait()
        process.wait()
        output.seek(0)
        if code in (4, 5):
            raise NoSuchTestsError((output.read().splitlines() or ["no word of pytest's"])[-1])
    return code == 0


class NoSuchTestsError(Exception):
    """A selection of tests that selects none."""


class Runner:
    """Judges faults in copies of the checkout, of which each is used by one fault at a time."""

    def __init__(self, copies: list[Path], *, proven: bool) -> None:
        self.copies: Queue[Path] = Queue()
        for copy in copies:
            self.copies.put(copy)
        self.proven = proven
        self.lock = threading.Lock()
        self.pass_alone: dict[str, bool] = {}

    def judge(self, fault: Fault) -> tuple[str, float]:
        """(verdict, seconds)"""
        started = time.monotonic()
        copy = self.copies.get()
        try:
            return self._verdict(fault, copy), time.monotonic() - started
        except NoSuchTestsError as error:
            return f"{STALE}: pytest {fault.tests}: {error}", time.monotonic() - started
        finally:
            self.copies.put(copy)

    def _verdict(self, fault: Fault, copy: Path) -> str:
        file = copy / fault.file
        text = file.read_text(encoding="utf-8") if file.is_file() else ""
        if text.count(fault.find) != 1:
            return STALE
        file.write_text(text.replace(fault.find, fault.replace), encoding="utf-8")
        try:
            survived = passes(fault.tests, copy)
        finally:
            file.write_text(text, encoding="utf-8")
        if survived:
            return SURVIVED
        return KILLED if not self.proven or self._pass_alone(fault.tests, copy) else UNPROVEN

    def _pass_alone(self, tests: str, copy: Path) -> bool:
        with self.lock:
            known = self.pass_alone.get(tests)
        if known is None:
            known = passes(tests, copy)
            with self.lock:
                self.pass_alone[tests] = known
        return known


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="faults with this text in file, description or tests")
    parser.add_argument("--after", type=int, default=0, metavar="N", help="leave out the first N of them")
    parser.add_argument("--list", action="store_true", help="name the faults and run nothing")
    parser.add_argument("--jobs", type=int, default=2, help="faults at a time")
    parser.add_argument("--unproven", action="store_true", help="do not run the tests without the fault as well")
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
    with tempfile.TemporaryDirectory(prefix="mutants-") as temp:
        copies = [copy_checkout(Path(temp) / str(number)) for number in range(options.jobs)]
        runner = Runner(copies, proven=not options.unproven)
        with ThreadPoolExecutor(options.jobs) as pool:
            results = zip(chosen, pool.map(runner.judge, chosen), strict=True)
            for number, (fault, (verdict, seconds)) in enumerate(results, start=1):
                verdicts[verdict.partition(":")[0]] += 1
                print(f"[{number}/{len(chosen)}] {verdict:<8} {seconds:4.0f} s  {fault.name}", flush=True)
    minutes = (time.monotonic() - started) / 60
    print(f"{len(chosen)} faults in {minutes:.0f} min: " + ", ".join(f"{n} {name}" for name, n in verdicts.items()))
    return int(verdicts[KILLED] != len(chosen))


if __name__ == "__main__":
    sys.exit(main())
