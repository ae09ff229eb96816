"""Starting ranks: this process when torchrun or srun made it one, else a group of processes on this node."""

import multiprocessing
import os
import secrets
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from minitron_nemo.distributed.ranks import Rank, rank_from_environment, stop
from minitron_nemo.distributed.stopping import END, GRACE, INTERRUPTED, STOP, hearing, is_leaving, obey, obeying_signals
from minitron_nemo.errors import RankError, StoppedError, UserError
from minitron_nemo.garbage import collect_from_here

# By name: what the ranks of every step will import, after what keeps the collector from looking at it.
PRELOADED = [
    "minitron_nemo.distributed.preloading",
    "torch",
    "minitron_nemo.steps.train",
    "minitron_nemo.steps.estimate",
    "minitron_nemo.steps.evaluate",
]
FIRST_PORT = 10000  # above what services of a machine usually listen at
PORTS_TRIED = 100
EPHEMERAL_PORTS = "/proc/sys/net/ipv4/ip_local_port_range"
FAREWELL = 10.0  # seconds for ranks that are done to take their process groups down


@dataclass(frozen=True)
class _Started:
    """A rank's process, the pipe on which it answers once, and the one whose only other end is ours."""

    process: Any
    answer: Connection
    lifeline: Connection

    def say(self, word: bytes) -> None:
        with suppress(OSError):  # a rank that is gone hears nothing
            self.lifeline.send_bytes(word)

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.process.pid, signal.SIGKILL)


def run_on_ranks(body: Callable[..., Any], *arguments: Any, num_ranks: int, gpu: bool = False) -> Any:
    """Call `body(rank, *arguments)` on every rank; returns rank 0's result.

    Under torchrun or srun this process is one rank of a world that exists. Otherwise `num_ranks` processes start on
    this node, the first that fails stops the others, and they end with this process. `body` and `arguments` must be
    importable or picklable, and the result no tensor: its memory may be gone with the rank before it is read (a numpy
    array is fine).
    Raises UserError when a rank raised one, StoppedError when all stopped because they were asked to,
    KeyboardInterrupt when they were where they could not, RankError when a rank failed otherwise.
    """
    if (rank := rank_from_environment()) is not None:
        with obeying_signals():
            result = body(rank, *arguments)
        stop()
        return result
    context, port = start_method(gpu=gpu), _free_port()
    started: list[_Started] = []
    in_peace = False
    with hearing(lambda: _say(started, STOP), last=lambda: _kill(started)) as asked:
        try:
            for index in range(num_ranks):
                rank = Rank(index, index, num_ranks)
                started.append(_start(context, (body, rank, arguments, port, gpu)))
            if asked():  # before the last one was there to hear it
                _say(started, STOP)
            result, stopped = _collect([one.answer for one in started], asked=asked)
            in_peace = True
        finally:
            if not in_peace:
                _say(started, END)
            _see_off(started, patience=FAREWELL if in_peace else GRACE + 0.5)
    if stopped is not None:
        raise StoppedError(stopped)
    return result


def start_method(*, gpu: bool) -> Any:
    """How processes of ranks start.

    On the CPU by a fork server, which imports torch and Megatron once, so that every group of ranks starts in a
    fraction of a second. With GPUs each by itself: Megatron brings Transformer Engine along, which may start CUDA, and
    a process forked after that cannot use it.
    """
    if gpu:
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def _start(context: Any, arguments: tuple) -> _Started:
    answer, sender = context.Pipe(duplex=False)
    listener, lifeline = context.Pipe(duplex=False)
    process = context.Process(target=_rank_main, args=(*arguments, sender, listener), daemon=True)
    process.start()
    sender.close()
    listener.close()
    return _Started(process, answer, lifeline)


def _say(started: Sequence[_Started], word: bytes) -> None:
    for one in started:
        one.say(word)


def _kill(started: Sequence[_Started]) -> None:
    for one in started:
        one.kill()


def _see_off(started: Sequence[_Started], *, patience: float) -> None:
    """Wait until every rank is gone, by one deadline for all; kill those that are not."""
    waiting, deadline = {one.answer: one for one in started}, time.monotonic() + patience
    while waiting and (left := deadline - time.monotonic()) > 0:
        for ready in wait(list(waiting), left):
            assert isinstance(ready, Connection)
            try:
                ready.recv_bytes()
            except (EOFError, OSError):  # the rank held the other end
                waiting.pop(ready)
    _kill(list(waiting.values()))
    for one in started:
        one.process.join(timeout=1)
        one.lifeline.close()
        one.answer.close()


def _free_port() -> int:
    """A port for the rendezvous that nobody else is likely to take before rank 0 listens there.

    Below those that the kernel hands out by itself: one of these would be anybody's again as soon as it is let go.
    """
    first = _first_ephemeral_port()
    for _ in range(PORTS_TRIED):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", first - 1 - secrets.randbelow(first - FIRST_PORT)))
            return int(probe.getsockname()[1])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _first_ephemeral_port() -> int:
    """The first of the ports that the kernel gives to whoever asks for any; 32768 is Linux's own choice."""
    try:
        with open(EPHEMERAL_PORTS, encoding="ascii") as file:
            first = int(file.read().split()[0])
    except (OSError, ValueError, IndexError):
        return 32768
    return first if first > FIRST_PORT else 32768


def _rank_main(
    body: Callable, rank: Rank, arguments: tuple, port: int, gpu: bool, sender: Connection, launcher: Connection
) -> None:
    collect_from_here()
    obey(launcher)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    if not gpu:
        torch.set_num_threads(max(1, _cores() // rank.world_size))
        if sys.platform == "linux":  # these ranks are neighbors: no need for the machine's name to resolve
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    try:
        sender.send(("done", body(rank, *arguments)))
        stop()
    except UserError as error:
        sender.send(("refused", str(error)))
    except StoppedError as error:
        sender.send(("stopped", str(error)))
        stop()
    except KeyboardInterrupt:
        sender.send(("interrupted", ""))
        sys.exit(INTERRUPTED)
    except BaseException:
        if is_leaving():
            sender.send(("interrupted", ""))
            sys.exit(INTERRUPTED)
        sender.send(("failed", f"rank {rank.rank} of {rank.world_size}:\n{traceback.format_exc()}"))
        sys.exit(1)


def _cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _collect(answers: list[Connection], *, asked: Callable[[], bool]) -> tuple[Any, str | None]:
    """Rank 0's result once every rank is done, and where they stopped if they did; the first failure is raised."""
    waiting: dict[Connection, int] = {answer: index for index, answer in enumerate(answers)}
    result = stopped = None
    while waiting:
        for ready in wait(list(waiting)):
            assert isinstance(ready, Connection)
            index = waiting.pop(ready)
            try:
                outcome, value = ready.recv()
            except EOFError:
                outcome = "interrupted" if asked() else "failed"
                value = f"rank {index} of {len(answers)} died without a word (out of memory?)"
            if outcome == "refused":
                raise UserError(value)
            if outcome == "interrupted":
                raise KeyboardInterrupt
            if outcome == "failed":
                print(value, file=sys.stderr)
                raise RankError(value.splitlines()[0])
            if outcome == "stopped":
                stopped = value
            elif index == 0:
                result = value
    return result, stopped
