"""Import, prune and export of a model of Llama-3.1-8B's shape beside the I/O floor of the same disk.

    python benchmarks/prune.py [--layers 2] [--vocab 32768] [--folder /tmp]
    python benchmarks/prune.py --layers 32 --vocab 128256      # the real size: 16 GB, 50 GB of room

Makes a Hugging Face folder of random bf16 weights, imports it, cuts its width and its depth by random scores and
exports it, as the recipes do: the hash of every input but the Hugging Face folder is checked on the way. Each step is
in a process of its own; the page cache is dropped before it, and outputs that no later step reads are removed.

Floors are measured just after each step, on the bytes that it read and wrote: a sequential read, a sequential write and
`fsync`, once as any program does it (`plain`), once past the page cache (`direct`); of more than 4 GB, on 4 GB and
scaled. The least CPU is that of the direct transfer and of SHA-256 over what is verified and what is written. CPU
seconds are per GB written, of steps that write nothing per GB read. The peak is anonymous memory above the start.

Cuts are made without their proof, which `--proofs` adds in rows of its own; `--quickstart` takes the quickstart's shape
and cut.
"""

import argparse
import dataclasses
import hashlib
import json
import mmap
import multiprocessing
import os
import platform
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch

from minitron_nemo.artefacts.origin import Origin
from minitron_nemo.checkpoint.formats.hf import export_hf, import_hf, open_hf
from minitron_nemo.checkpoint.formats.hf_config import config_from_arch
from minitron_nemo.checkpoint.formats.hf_names import hf_tensors
from minitron_nemo.checkpoint.formats.nemo import NemoFolder, open_nemo
from minitron_nemo.checkpoint.safetensors_stream import SafetensorsWriter
from minitron_nemo.checkpoint.source import stream
from minitron_nemo.importance.scores import ImportanceScores
from minitron_nemo.pruning.make_plan import make_plan
from minitron_nemo.pruning.plan import read_plan
from minitron_nemo.pruning.proof import prove_cut
from minitron_nemo.shape.arch import ModelArch
from minitron_nemo.shape.axes import AXES
from minitron_nemo.steps.prune import prune

BLOCK = 2**24  # bytes that a floor reads and writes at a time
SCALED_ABOVE = 4 * 10**9
DROP_CACHES = Path("/proc/sys/vm/drop_caches")


def quickstart() -> ModelArch:
    return ModelArch(num_layers=6, hidden_size=128, ffn_hidden_size=384, num_attention_heads=4, num_query_groups=2,
                     kv_channels=32, vocab_size=2048, seq_length=512)  # fmt: skip


def llama(layers: int, vocab: int) -> ModelArch:
    return ModelArch(
        num_layers=layers, hidden_size=4096, ffn_hidden_size=14336, num_attention_heads=32, num_query_groups=8,
        kv_channels=128, vocab_size=vocab, seq_length=8192, rotary_base=500000.0,
    )  # fmt: skip


def make_hf(folder: Path, arch: ModelArch) -> None:
    """Random weights; one block of them over and over, as drawing takes longer than all that is measured."""
    folder.mkdir()
    drawn = torch.randn(2**24).bfloat16()
    shapes = dict(hf_tensors(arch))
    with SafetensorsWriter(folder / "model.safetensors", shapes, dtype=torch.bfloat16) as writer:
        for name, shape in shapes.items():
            count = torch.Size(shape).numel()
            writer.write(name, drawn.repeat(count // len(drawn) + 1)[:count].view(shape))
    (folder / "config.json").write_text(json.dumps(config_from_arch(arch, dtype=torch.bfloat16, base=None)))
    (folder / "tokenizer.json").write_text("{}")


def model(folder: Path) -> NemoFolder:
    return open_nemo(folder / "model.nemo", verify_while_read=True)


def cut(folder: Path, name: str, **sizes: int) -> None:
    source = model(folder)
    arch, generator = source.arch, torch.Generator().manual_seed(0)
    drawn = {}
    for axis in AXES.values():
        shape = (arch.num_layers, axis.size(arch)) if axis.per_layer else (axis.size(arch),)
        drawn[axis.name] = torch.rand(shape, generator=generator, dtype=torch.float64)
    scores = ImportanceScores(arch=arch, by_axis=drawn, num_samples=1, seq_length=1, sequence_aggregation="mean",
                              batch_aggregation="l2", data_fingerprint="")  # fmt: skip
    prune(source, make_plan(scores, dataclasses.replace(arch, **sizes)), folder / name, proof=False)


def prove(folder: Path, name: str) -> None:
    student = open_nemo(folder / name)
    prove_cut(open_nemo(folder / "model.nemo").weights, student.weights, read_plan(student.path / "plan.json"))


def do_import(folder: Path) -> None:
    hf = open_hf(folder / "hf")
    import_hf(hf, folder / "model.nemo", tensors=stream(hf.weights), origin=Origin("benchmark"))


def do_width(folder: Path) -> None:
    arch = model(folder).arch
    ffn = {14336: 9216, 384: 256}[arch.ffn_hidden_size]
    cut(folder, "width.nemo", hidden_size=arch.hidden_size * 3 // 4, ffn_hidden_size=ffn)


def do_depth(folder: Path) -> None:
    cut(folder, "depth.nemo", num_layers=model(folder).arch.num_layers // 2)


def do_export(folder: Path) -> None:
    export_hf(model(folder), folder / "exported", origin=Origin("benchmark"))


@dataclass(frozen=True)
class Step:
    """What is measured, what it reads and writes, whether it verifies what it reads, and what nobody reads after it."""

    name: str
    do: Callable[[Path], None]
    source: str
    target: str | None = None
    verifies: bool = True
    removes: tuple[str, ...] = ()


def do_prove_width(folder: Path) -> None:
    prove(folder, "width.nemo")


def do_prove_depth(folder: Path) -> None:
    prove(folder, "depth.nemo")


STEPS = (
    Step("import", do_import, "hf", "model.nemo", verifies=False, removes=("hf",)),
    Step("prune width", do_width, "model.nemo", "width.nemo"),
    Step("prove width", do_prove_width, "model.nemo", verifies=False),
    Step("prune depth", do_depth, "model.nemo", "depth.nemo", removes=("width.nemo",)),
    Step("prove depth", do_prove_depth, "depth.nemo", verifies=False),
    Step("export", do_export, "model.nemo", "exported", removes=("depth.nemo",)),
)


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def drop_cache(folder: Path) -> str:
    """Forget what was read and written, of the whole machine where that is permitted; says of what."""
    os.sync()
    if os.access(DROP_CACHES, os.W_OK):
        DROP_CACHES.write_text("1")
        return "of the machine"
    for path in [path for path in folder.rglob("*") if path.is_file()]:
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
    for path in [path for path in source.rglob("*") if path.is_file()]:
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


def measure(number: int, folder: Path) -> tuple[float, float, float]:
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
    STEPS[number].do(folder)
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    done.set()
    watcher.join()
    return seconds, cpu, peak - before


def row(number: int, folder: Path) -> str:
    """A line of the table."""
    step = STEPS[number]
    drop_cache(folder)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        seconds, cpu, peak = pool.apply(measure, (number, folder))
    read, written = size(folder / step.source), size(folder / step.target) if step.target else 0
    plain, _ = floor(folder, folder / step.source, read, written, direct=False)
    direct, least = floor(folder, folder / step.source, read, written, direct=True)
    least += sha256_seconds() * (written + read * step.verifies)
    per_gb = 1e9 / (written or read)
    return (f"{step.name:<12}{read / 1e9:>6.2f}{written / 1e9:>7.2f}{seconds:>9.2f}{plain:>8.2f}{seconds / plain:>7.2f}"
            f"{direct:>8.2f}{seconds / direct:>7.2f}{cpu * per_gb:>10.2f}{least * per_gb:>7.2f}"
            f"{peak / 2**20:>10.0f}")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--vocab", type=int, default=32768)
    parser.add_argument("--quickstart", action="store_true", help="the quickstart's shape instead")
    parser.add_argument("--proofs", action="store_true", help="measure the proofs of both cuts too")
    parser.add_argument("--folder", default=None, help="where to work; default: the system's temporary folder")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        arch = quickstart() if options.quickstart else llama(options.layers, options.vocab)
        make_hf(folder / "hf", arch)
        print(f"{date.today()}, {platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, "
              f"Python {platform.python_version()}, torch {torch.__version__}")  # fmt: skip
        print(f"{arch.num_layers} layers, vocabulary {arch.vocab_size}: {size(folder / 'hf') / 1e9:.2f} GB; "
              f"page cache {drop_cache(folder)} dropped before each step and floor")  # fmt: skip
        columns = {"step": 0, "GB in": 6, "GB out": 7, "seconds": 9, "plain": 8, "ratio": 7, "direct": 8, "ratio ": 7,
                   "CPU s/GB": 10, "least": 7, "peak MiB": 10}  # fmt: skip
        print("step".ljust(12) + "".join(name.rjust(width) for name, width in columns.items() if width))
        for number, step in enumerate(STEPS):
            if options.proofs or step.target:
                print(row(number, folder), flush=True)
            for name in step.removes:
                shutil.rmtree(folder / name, ignore_errors=True)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
