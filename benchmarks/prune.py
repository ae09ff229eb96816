"""Import, prune and export of a model of Llama-3.1-8B's shape beside the I/O floor of the same disk.

    python benchmarks/prune.py [--layers 2] [--vocab 32768] [--folder /tmp]
    python benchmarks/prune.py --layers 32 --vocab 128256      # the real size: 16 GB, 50 GB of room

Makes a Hugging Face folder of random bf16 weights, imports it, cuts its width and its depth by random scores and
exports it, as the recipes do: the hash of every input but the Hugging Face folder is checked on the way. Each step is
in a process of its own; the page cache is dropped before it, and outputs that no later step reads are removed.

Floors and columns: io_floor.py.

Cuts are made without their proof, which `--proofs` adds in rows of its own; `--quickstart` takes the quickstart's shape
and cut.
"""

import argparse
import dataclasses
import json
import shutil
import tempfile
from pathlib import Path

import torch
from io_floor import Step, size, table

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
        steps = [step for step in STEPS if options.proofs or step.target]
        table(steps, folder, title=f"{arch.num_layers} layers, vocabulary {arch.vocab_size}: "
                                   f"{size(folder / 'hf') / 1e9:.2f} GB")  # fmt: skip
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
