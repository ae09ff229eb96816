"""How ranks end: with their launcher, whatever killed it, and at once when one of them fails or all are told to."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from minitron_nemo.distributed import launch
from minitron_nemo.distributed.launch import run_on_ranks
from minitron_nemo.distributed.stopping import hearing
from minitron_nemo.errors import RankError, UserError

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 60  # seconds for a slow machine to start something; none of the laws hangs on it
SCRIPT = """
import sys, time
from pathlib import Path
from minitron_nemo.cli import leave, run_safely
from minitron_nemo.distributed.launch import PRELOADED, run_on_ranks
from minitron_nemo.distributed.stopping import finishing
from minitron_nemo.errors import StoppedError

def sleep(rank, folder):
    import os
    (folder / f"pid_{rank.rank}.tmp").write_text(str(os.getpid()))
    (folder / f"pid_{rank.rank}.tmp").rename(folder / f"pid_{rank.rank}")
    try:
        time.sleep(300)
    except KeyboardInterrupt:
        (folder / f"cleaned_{rank.rank}").touch()
        raise

def train(rank, folder):
    with finishing() as asked:
        import os
        (folder / f"pid_{rank.rank}.tmp").write_text(str(os.getpid()))
        (folder / f"pid_{rank.rank}.tmp").rename(folder / f"pid_{rank.rank}")
        while not asked() or (folder / "stubborn").exists():
            time.sleep(0.02)
            if asked():
                (folder / f"heard_{rank.rank}").touch()
        raise StoppedError(f"at step 3, {len(list(folder.glob('pid_?')))} ranks")

if __name__ == "__main__":
    PRELOADED[:] = ["torch"]
    body, folder = globals()[sys.argv[1]], Path(sys.argv[2])
    leave(run_safely(lambda: run_on_ranks(body, folder, num_ranks=2)))
"""


@pytest.fixture
def start(tmp_path):
    """Starts the script with a body on two ranks; gives the launcher and the ranks' process ids."""
    script, processes = tmp_path / "script.py", []
    script.write_text(SCRIPT)

    def started(body, *, ranks=2, **environment):
        process = subprocess.Popen(
            [sys.executable, str(script), body, str(tmp_path)], cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
            start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        processes.append(process)
        deadline = time.monotonic() + PATIENCE
        while len(found := list(tmp_path.glob("pid_?"))) < ranks:
            assert process.poll() is None, process.stdout.read()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        return process, [int(path.read_text()) for path in found]

    yield started
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def runs(pid):
    """Whether a process is there and is no zombie that nobody buried yet."""
    try:
        return not re.search(r"\) Z ", Path(f"/proc/{pid}/stat").read_text())
    except FileNotFoundError:
        return False


def seconds_until_gone(pids):
    began = time.monotonic()
    while any(map(runs, pids)):
        assert time.monotonic() - began < PATIENCE, "ranks go on without their launcher"
        time.sleep(0.02)
    return time.monotonic() - began


def test_ranks_end_with_a_launcher_that_alone_is_killed(start):
    launcher, ranks = start("train")
    os.kill(launcher.pid, signal.SIGKILL)
    assert seconds_until_gone(ranks) < 4


def test_a_launcher_told_to_stop_ends_its_ranks_and_itself_with_130(start, tmp_path):
    launcher, ranks = start("sleep")
    os.kill(launcher.pid, signal.SIGTERM)
    began = time.monotonic()
    output, _ = launcher.communicate(timeout=PATIENCE)
    assert launcher.returncode == 130, output
    assert time.monotonic() - began < 8
    assert output == "interrupted; run the same command again to go on\n"
    assert seconds_until_gone(ranks) < 1
    assert len(list(tmp_path.glob("cleaned_?"))) == 2, "what a rank was writing is removed"


@pytest.mark.parametrize(("tell", "number"), [(os.kill, signal.SIGUSR1), (os.killpg, signal.SIGINT)])
def test_work_that_stops_by_itself_is_waited_for(start, tell, number):
    """A terminal tells the whole group: that is one request, and the launcher's."""
    launcher, ranks = start("train")
    tell(launcher.pid, number)
    output, _ = launcher.communicate(timeout=PATIENCE)
    assert launcher.returncode == 75, output
    assert output == "stopped: at step 3, 2 ranks; run the same command again to go on\n"
    assert seconds_until_gone(ranks) < 1


def test_a_second_request_leaves_at_once(start, tmp_path):
    (tmp_path / "stubborn").touch()
    launcher, ranks = start("train")
    os.kill(launcher.pid, signal.SIGTERM)
    deadline = time.monotonic() + PATIENCE
    while len(list(tmp_path.glob("heard_?"))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(1.2)  # within a second it would be the same request
    assert launcher.poll() is None
    os.kill(launcher.pid, signal.SIGTERM)
    launcher.communicate(timeout=PATIENCE)
    assert launcher.returncode == 143
    assert seconds_until_gone(ranks) < 2


@pytest.mark.parametrize(
    ("body", "number", "code"),
    [("train", signal.SIGTERM, 75), ("train", signal.SIGUSR1, 75), ("sleep", signal.SIGTERM, 130)],
)
def test_a_rank_of_torchrun_hears_its_signals_itself(start, body, number, code):
    rank, _ = start(body, ranks=1, RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    os.kill(rank.pid, number)
    os.kill(rank.pid, number)  # torchrun and srun pass on what the terminal sent already
    output, _ = rank.communicate(timeout=PATIENCE)
    assert rank.returncode == code, output


def test_a_request_that_was_heard_inside_is_no_second_one_outside():
    """What torchrun repeats while the command ends must not turn "stopped and saved" into "interrupted"."""
    heard = []
    with hearing(lambda: heard.append("outside")) as was_asked:
        with hearing(lambda: heard.append("inside")):
            os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert was_asked()
    assert heard == ["inside"]


@pytest.mark.parametrize(("said", "first"), [("20000\t60999\n", 20000), ("1024 65535", 32768), (None, 32768)])
def test_ranks_meet_at_a_port_that_the_kernel_hands_to_nobody(tmp_path, monkeypatch, said, first):
    if said is not None:
        (tmp_path / "range").write_text(said)
    monkeypatch.setattr(launch, "EPHEMERAL_PORTS", str(tmp_path / "range"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0 if first < 32768 else launch._free_port()))
        below = iter([first - 1 - taken.getsockname()[1], 7] if first == 32768 else [7])
        monkeypatch.setattr(launch.secrets, "randbelow", lambda limit: next(below))
        assert launch._free_port() == first - 8


def fail_in_rank_1(rank, how):
    if rank.rank == 1:
        raise {"user": UserError, "defect": ArithmeticError}[how](f"rank {rank.rank} says no")
    time.sleep(100)


@pytest.mark.parametrize(("how", "error"), [("user", UserError), ("defect", RankError)])
def test_a_failing_rank_is_told_of_soon_whatever_the_number_of_ranks(how, error):
    assert run_on_ranks(number_of, num_ranks=1) == 0  # the fork server is up
    began = time.monotonic()
    with pytest.raises(error, match=r"rank 1"):
        run_on_ranks(fail_in_rank_1, how, num_ranks=4)
    assert time.monotonic() - began < 8


def number_of(rank):
    return rank.rank
