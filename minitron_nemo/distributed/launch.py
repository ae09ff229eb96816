"""Starting ranks: this process when torchrun or srun made it one, else a group of processes on this node."""

import multiprocessing
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from minitron_nemo.distributed.ranks import Rank, rank_from_environment, stop
from minitron_nemo.errors import RankError, UserError

# By name: what the ranks of every step will import.
PRELOADED = ["torch", "minitron_nemo.steps.train", "minitron_nemo.steps.estimate", "minitron_nemo.steps.evaluate"]


def run_on_ranks(body: Callable[..., Any], *arguments: Any, num_ranks: int, gpu: bool = False) -> Any:
    """Call `body(rank, *arguments)` on every rank; returns rank 0's result.

    Under torchrun or srun this process is one rank of a world that exists. Otherwise `num_ranks` processes start on
    this node, and the first that fails stops the others. `body` and `arguments` must be importable or picklable, and
    the result no tensor: its memory may be gone with the rank before it is read (a numpy array is fine).
    Raises UserError when a rank raised one, RankError when a rank failed otherwise.
    """
    if (rank := rank_from_environment()) is not None:
        result = body(rank, *arguments)
        stop()
        return result
    # A fork server imports torch and Megatron once; every group of ranks then starts in a fraction of a second,
    # from a process that holds no threads and no CUDA context.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    port = _free_port()
    processes, pipes = [], []
    for index in range(num_ranks):
        receiver, sender = context.Pipe(duplex=False)
        rank = Rank(index, index, num_ranks)
        process = context.Process(target=_rank_main, args=(body, rank, arguments, port, gpu, sender), daemon=True)
        process.start()
        sender.close()
        processes.append(process)
        pipes.append(receiver)
    try:
        return _collect(pipes)
    finally:
        for process in processes:
            process.join(timeout=10)
            if process.is_alive():
                process.kill()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _rank_main(body: Callable, rank: Rank, arguments: tuple, port: int, gpu: bool, sender: Connection) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    if not gpu:
        torch.set_num_threads(max(1, _cores() // rank.world_size))
        if sys.platform == "linux":  # these ranks are neighbors: no need for the machine's name to resolve
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    try:
        sender.send(("done", body(rank, *arguments)))
        stop()
    except UserError as error:
        sender.send(("refused", str(error)))
    except KeyboardInterrupt:
        sys.exit(130)
    except BaseException:
        sender.send(("failed", f"rank {rank.rank} of {rank.world_size}:\n{traceback.format_exc()}"))
        sys.exit(1)


def _cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _end_with(server: int) -> None:
    """End this rank when the fork server ends, which ends with the command: a killed command leaves no ranks behind."""
    while os.getppid() == server:
        time.sleep(1)
    os._exit(1)


def _collect(pipes: list[Connection]) -> Any:
    """Rank 0's result once every rank is done; the first failure is raised at once."""
    waiting: dict[Connection, int] = {pipe: index for index, pipe in enumerate(pipes)}
    result = None
    while waiting:
        for ready in wait(list(waiting)):
            assert isinstance(ready, Connection)
            index = waiting.pop(ready)
            try:
                outcome, value = ready.recv()
            except EOFError:
                outcome, value = "failed", f"rank {index} of {len(pipes)} died without a word (out of memory?)"
            if outcome == "refused":
                raise UserError(value)
            if outcome == "failed":
                print(value, file=sys.stderr)
                raise RankError(value.splitlines()[0])
            if index == 0:
                result = value
    return result
