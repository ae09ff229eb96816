"""What a step that streams files costs beside the transfers it cannot do without, measured on the same disk.

Floors are measured just after each step, on the bytes that it read and wrote: a sequential read, a sequential write and
`fsync`, once as any program does it (`plain`), once past the page cache (`direct`); of more than 4 GB, on 4 GB and
scaled. The least CPU is that of the direct transfer and of SHA-256 over what is verified and what is written. CPU
seconds are per GB written, of steps that write nothing per GB read. The peak is anonymous memory above the start.
"""

import hashlib
import mmap
import multiprocessing
import os
import platform
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch

BLOCK = 2**24  # bytes that a floor reads and writes at a time
SCALED_ABOVE = 4 * 10**9
DROP_CACHES = Path("/proc/sys/vm/drop_caches")
NAME = 22  # characters of a step's name
COLUMNS = {"GB in": 6, "GB out": 7, "seconds": 9, "plain": 8, "ratio": 7, "direct": 8, "ratio ": 7, "CPU s/GB": 10,
           "least": 7, "peak MiB": 10}  # fmt: skip


@dataclass(frozen=True)
class Step:
    """What is measured, what it reads and writes, whether it verifies what it reads, and what nobody reads after it."""

    name: str
    do: Callable[[Path], None]
    source: str
    target: str | None = None
    verifies: bool = True
    removes: tuple[str, ...] = ()


def files_of(place: Path) -> list[Path]:
    return [place] if place.is_file() else [path for path in place.rglob("*") if path.is_file()]


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in files_of(folder))


def drop_cache(folder: Path) -> str:
    """Forget what was read and written, of the whole machine where that is permitted; says of what."""
    os.sync()
    if os.access(DROP_CACHES, os.W_OK):
        DROP_CACHES.write_text("1")
        return "of the machine"
    for path in files_of(folder):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return "of the files"


def floor(folder: Path, source: Path, read: int, written: int, *, direct: bool) -> tuple[float, float]:
    """(seconds, CPU seconds) to read so many bytes of a folder and to write so many new ones, with `fsync`."""
    scale = max(read, written, SCALED_ABOVE) / SCALED_ABOVE
    read, written = int(read / scale), int(written / scale) // BLOCK * BLOCK or written
    direct = direct and written % BLOCK == 0
    block = mmap.mmap(-1, BLOCK)  # at the start of a page, as direct transfers need
    flags = os.O_DIRECT if direct else 0
    drop_cache(folder)
    started, cpu = time.perf_counter(), time.process_time()
    for path in files_of(source):
        file = os.open(path, os.O_RDONLY | flags)
        while read > 0 and (count := os.readv(file, [block])):
            read -= count
        os.close(file)
    scratch = folder / "floor"
    file = os.open(scratch, os.O_WRONLY | os.O_CREAT | flags)
    for start in range(0, written, BLOCK):
        os.write(file, memoryview(block)[: min(BLOCK, written - start)])
    os.fsync(file)
    os.close(file)
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    scratch.unlink()
    return seconds * scale, cpu * scale


def sha256_seconds() -> float:
    """CPU seconds per byte of SHA-256."""
    block, times = bytes(BLOCK), 16
    cpu = time.process_time()
    for _ in range(times):
        hashlib.sha256(block)
    return (time.process_time() - cpu) / (times * BLOCK)


def anonymous_memory() -> int:
    """Bytes of this process that are no file's."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


def measure(do: Callable[[Path], None], folder: Path) -> tuple[float, float, float]:
    """(seconds, CPU seconds, bytes of anonymous memory at the peak above the start) of a step."""
    torch.empty(2**20).bfloat16()
    before = peak = anonymous_memory()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.02):
            peak = max(peak, anonymous_memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    started, cpu = time.perf_counter(), time.process_time()
    do(folder)
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    done.set()
    watcher.join()
    return seconds, cpu, peak - before


def row(step: Step, folder: Path) -> str:
    """A line of the table."""
    drop_cache(folder)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        seconds, cpu, peak = pool.apply(measure, (step.do, folder))
    read, written = size(folder / step.source), size(folder / step.target) if step.target else 0
    plain, _ = floor(folder, folder / step.source, read, written, direct=False)
    direct, least = floor(folder, folder / step.source, read, written, direct=True)
    least += sha256_seconds() * (written + read * step.verifies)
    per_gb = 1e9 / (written or read)
    return (f"{step.name:<{NAME}}{read / 1e9:>6.2f}{written / 1e9:>7.2f}{seconds:>9.2f}"
            f"{plain:>8.2f}{seconds / plain:>7.2f}{direct:>8.2f}{seconds / direct:>7.2f}"
            f"{cpu * per_gb:>10.2f}{least * per_gb:>7.2f}{peak / 2**20:>10.0f}")  # fmt: skip


def table(steps: Sequence[Step], folder: Path, *, title: str) -> None:
    """Run the steps and print a line for each; what a step `removes` goes after it."""
    print(f"{date.today()}, {platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, "
          f"Python {platform.python_version()}, torch {torch.__version__}")  # fmt: skip
    print(f"{title}; page cache {drop_cache(folder)} dropped before each step and floor")
    print("step".ljust(NAME) + "".join(name.rjust(width) for name, width in COLUMNS.items()))
    for step in steps:
        print(row(step, folder), flush=True)
        for name in step.removes:
            gone = folder / name
            gone.unlink() if gone.is_file() else shutil.rmtree(gone, ignore_errors=True)
