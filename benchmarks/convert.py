"""Conversions of a model of Llama-3.1-8B's shape beside the I/O floor of the same disk.

    python benchmarks/convert.py [--layers 2] [--vocab 32768] [--folder /tmp]
    python benchmarks/convert.py --layers 32 --vocab 128256      # the real size: 16 GB, 55 GB of room

Makes a Hugging Face folder of random bf16 weights and takes it to a `.nemo` in the files of TP8, from there to the
files of TP2 x PP4, into one tar and out of it, and back to Hugging Face, as `recipes/convert.py` does it. Each step is
in a process of its own; the page cache is dropped before it. Rows `without SHA-256` have the hashes of what is read and
written taken out by force: no recipe does that. Floors and columns: io_floor.py.
"""

import argparse
import shutil
import tempfile
from functools import partial
from pathlib import Path

from io_floor import Step, size, table
from prune import llama, make_hf

from minitron_nemo.artefacts.origin import Origin
from minitron_nemo.checkpoint import hashed_files
from minitron_nemo.distributed.layout import Layout
from minitron_nemo.steps.convert import convert


class NoSha256:
    """In the place of the thread that hashes."""

    def add(self, data: memoryview) -> "NoSha256":
        return self

    def result(self) -> None: ...

    def hexdigest(self) -> str:
        return "0" * 64

    def close(self) -> None: ...


def do(source: str, target: str, format: str, layout: Layout, hashes: bool, folder: Path) -> None:
    """A conversion, in a process of its own."""
    if not hashes:
        hashed_files._Sha256 = NoSha256  # type: ignore[assignment,misc]
        hashed_files.VerifiedFile.verify = lambda self: None  # type: ignore[method-assign]
    convert(folder / source, folder / target, format=format, layout=layout, origin=Origin("benchmark"))


ALONE, TP8, TP2_PP4 = Layout(), Layout(tp=8), Layout(tp=2, pp=4)


def step(name: str, source: str, target: str, format: str, layout: Layout = ALONE, *, hashes: bool = True,
         removes: tuple[str, ...] = ()) -> Step:  # fmt: skip
    verifies = hashes and source != "hf"
    return Step(name, partial(do, source, target, format, layout, hashes), source, target, verifies, removes)


STEPS = (
    step("hf to TP8", "hf", "tp8.nemo", "nemo", TP8),
    step("  without SHA-256", "hf", "bare.nemo", "nemo", TP8, hashes=False, removes=("bare.nemo", "hf")),
    step("TP8 to TP2 x PP4", "tp8.nemo", "tp2pp4.nemo", "nemo", TP2_PP4, removes=("tp2pp4.nemo",)),
    step("  without SHA-256", "tp8.nemo", "bare.nemo", "nemo", TP2_PP4, hashes=False, removes=("bare.nemo",)),
    step("TP8 to hf", "tp8.nemo", "back", "hf", removes=("back",)),
    step("pack", "tp8.nemo", "packed.nemo", "nemo_tar"),
    step("unpack", "packed.nemo", "unpacked.nemo", "nemo"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--vocab", type=int, default=32768)
    parser.add_argument("--folder", default=None, help="where to work; default: the system's temporary folder")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        make_hf(folder / "hf", llama(options.layers, options.vocab))
        (folder / "hf" / "tokenizer.json").unlink()
        title = f"{options.layers} layers, vocabulary {options.vocab}: {size(folder / 'hf') / 1e9:.2f} GB"
        table(STEPS, folder, title=title)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
