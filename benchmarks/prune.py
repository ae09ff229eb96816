"""Import, prune and export of a model of Llama-3.1-8B's shape beside the I/O floor of the same disk.

    python benchmarks/prune.py [--layers 2] [--vocab 32768] [--folder /tmp]

Makes a Hugging Face folder of random bf16 weights, imports it, cuts its width and its depth by random scores and
exports it; each in a process of its own, so that peak memory is its own. The floor of a step is a plain read and a
plain write, with `fsync`, of as many bytes, measured just before it. CPU seconds are per GB written, of steps that
write nothing per GB read. Cuts are made without their proof, which has rows of its own; `--quickstart` takes the
quickstart's shape and cut.
"""

import argparse
import dataclasses
import json
import multiprocessing
import os
import platform
import resource
import shutil
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch

from minitron_nemo.artefacts.origin import Origin
from minitron_nemo.checkpoint.formats.hf import export_hf, import_hf, open_hf
from minitron_nemo.checkpoint.formats.hf_config import config_from_arch
from minitron_nemo.checkpoint.formats.hf_names import hf_tensors
from minitron_nemo.checkpoint.formats.nemo import open_nemo
from minitron_nemo.checkpoint.safetensors_stream import SafetensorsWriter
from minitron_nemo.checkpoint.source import stream
from minitron_nemo.importance.scores import ImportanceScores
from minitron_nemo.pruning.make_plan import make_plan
from minitron_nemo.pruning.plan import read_plan
from minitron_nemo.pruning.proof import prove_cut
from minitron_nemo.shape.arch import ModelArch
from minitron_nemo.shape.axes import AXES
from minitron_nemo.steps.prune import prune

BLOCK = 2**24  # bytes that the floor reads and writes at a time


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


def cut(folder: Path, name: str, **sizes: int) -> None:
    model = open_nemo(folder / "model.nemo")
    arch, generator = model.arch, torch.Generator().manual_seed(0)
    drawn = {}
    for axis in AXES.values():
        shape = (arch.num_layers, axis.size(arch)) if axis.per_layer else (axis.size(arch),)
        drawn[axis.name] = torch.rand(shape, generator=generator, dtype=torch.float64)
    scores = ImportanceScores(arch=arch, by_axis=drawn, num_samples=1, seq_length=1, sequence_aggregation="mean",
                              batch_aggregation="l2", data_fingerprint="")  # fmt: skip
    prune(model, make_plan(scores, dataclasses.replace(arch, **sizes)), folder / name, proof=False)


def prove(folder: Path, name: str) -> None:
    student = open_nemo(folder / name)
    prove_cut(open_nemo(folder / "model.nemo").weights, student.weights, read_plan(student.path / "plan.json"))


def do_import(folder: Path) -> None:
    hf = open_hf(folder / "hf")
    import_hf(hf, folder / "model.nemo", tensors=stream(hf.weights), origin=Origin("benchmark"))


def do_verify(folder: Path) -> None:
    open_nemo(folder / "model.nemo", verify=True)


def do_width(folder: Path) -> None:
    arch = open_nemo(folder / "model.nemo").arch
    ffn = {14336: 9216, 384: 256}[arch.ffn_hidden_size]
    cut(folder, "width.nemo", hidden_size=arch.hidden_size * 3 // 4, ffn_hidden_size=ffn)


def do_depth(folder: Path) -> None:
    cut(folder, "depth.nemo", num_layers=open_nemo(folder / "model.nemo").arch.num_layers // 2)


def do_prove_width(folder: Path) -> None:
    prove(folder, "width.nemo")


def do_prove_depth(folder: Path) -> None:
    prove(folder, "depth.nemo")


def do_export(folder: Path) -> None:
    export_hf(open_nemo(folder / "model.nemo"), folder / "exported", origin=Origin("benchmark"))


# what is measured, what it reads, what it writes
STEPS: dict[str, tuple[Callable[[Path], None], str, str | None]] = {
    "import": (do_import, "hf", "model.nemo"),
    "verify": (do_verify, "model.nemo", None),
    "prune width": (do_width, "model.nemo", "width.nemo"),
    "prove width": (do_prove_width, "model.nemo", None),
    "prune depth": (do_depth, "model.nemo", "depth.nemo"),
    "prove depth": (do_prove_depth, "depth.nemo", None),
    "export": (do_export, "model.nemo", "exported"),
}


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def floor(folder: Path, source: Path, read: int, written: int) -> float:
    """Seconds to read so many bytes of a folder and to write so many new ones."""
    block = bytearray(BLOCK)
    started = time.perf_counter()
    for path in [path for path in source.rglob("*") if path.is_file()]:
        with path.open("rb", buffering=0) as file:
            while read > 0 and (count := file.readinto(block)):
                read -= count
    scratch = folder / "floor"
    with scratch.open("wb", buffering=0) as file:
        for start in range(0, written, BLOCK):
            file.write(memoryview(block)[: min(BLOCK, written - start)])
        os.fsync(file.fileno())
    seconds = time.perf_counter() - started
    scratch.unlink()
    return seconds


def measure(name: str, folder: Path) -> tuple[float, float, float]:
    """(seconds, CPU seconds, bytes at the peak above the start) of a step."""
    torch.empty(2**20).bfloat16()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started, cpu = time.perf_counter(), time.process_time()
    STEPS[name][0](folder)
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    return seconds, cpu, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--vocab", type=int, default=32768)
    parser.add_argument("--quickstart", action="store_true", help="the quickstart's shape instead")
    parser.add_argument("--folder", default=None, help="where to work; default: the system's temporary folder")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        arch = quickstart() if options.quickstart else llama(options.layers, options.vocab)
        make_hf(folder / "hf", arch)
        print(f"{date.today()}, {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, "
              f"torch {torch.__version__}")  # fmt: skip
        print(f"{arch.num_layers} layers, vocabulary {arch.vocab_size}: {size(folder / 'hf') / 1e9:.2f} GB")
        columns = {"GB in": 7, "GB out": 8, "seconds": 9, "floor": 7, "ratio": 7, "CPU s/GB": 10, "peak MiB": 10}
        print(f"{'step':<13}" + "".join(name.rjust(width) for name, width in columns.items()))
        for name, (_, source, target) in STEPS.items():
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                seconds, cpu, peak = pool.apply(measure, (name, folder))
            read = size(folder / source)
            written = size(folder / target) if target else 0
            # A depth prune needs only the layers that stay.
            needed = min(read, written) if name == "prune depth" else read
            least = floor(folder, folder / source, needed, written)
            print(f"{name:<13}{needed / 1e9:>7.2f}{written / 1e9:>8.2f}{seconds:>9.2f}{least:>7.2f}"
                  f"{seconds / least:>7.2f}{cpu / (written or read) * 1e9:>10.2f}{peak / 2**20:>10.0f}")  # fmt: skip
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
