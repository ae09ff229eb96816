"""What the hooks of importance estimation cost over the bare forward passes that they listen to.

    python benchmarks/estimate_importance.py [--repeats 5] [--threads 1]

One process, one model of random weights for each shape; bare and hooked forward passes take turns, and the ratio is
that of the fastest of each, in CPU seconds of the process, which others on the machine disturb less than the clock. On
a GPU seconds are those of the clock, the shape is Llama-3.1-8B's layers, and a last line says what 1,024 samples take.
`read` is the floor, in the same turns: hooks at the same sites that only add up what they hear over the sequence, which
reads it once.
`--aggregation` is the one over the sequence: each takes other sums.
"""

import argparse
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import date
from importlib.metadata import version
from typing import Any

import torch

from minitron_nemo.distributed.launch import run_on_ranks
from minitron_nemo.distributed.layout import Layout
from minitron_nemo.distributed.ranks import Rank
from minitron_nemo.importance.criteria import CRITERIA
from minitron_nemo.importance.sites import HEAD_CHANNELS, HEADS, QUERY_GROUPS
from minitron_nemo.shape.arch import ModelArch
from minitron_nemo.testing import random_batch

# name: (layers, hidden, ffn, heads, query groups, channels of a head), samples in a pass, tokens of a sample, dtype
SHAPES = {
    "quickstart": ((6, 128, 384, 4, 2, 32), 16, 256, "float32"),
    "hidden 512": ((2, 512, 1792, 8, 4, 64), 2, 512, "float32"),
    "hidden 1024": ((2, 1024, 3584, 16, 8, 64), 1, 1024, "float32"),
    "hidden 1024, bf16": ((2, 1024, 3584, 16, 8, 64), 1, 256, "bfloat16"),
}
ON_GPU = {"llama31_8b": ((32, 4096, 14336, 32, 8, 128), 4, 4096, "bfloat16")}
SAMPLES = 1024  # of the papers' calibration set


def arch_of(sizes: tuple[int, ...], seq_length: int) -> ModelArch:
    layers, hidden, ffn, heads, groups, channels = sizes
    return ModelArch(num_layers=layers, hidden_size=hidden, ffn_hidden_size=ffn, num_attention_heads=heads,
                     num_query_groups=groups, kv_channels=channels, vocab_size=2048, seq_length=seq_length)  # fmt: skip


def seconds(work: Callable[[], object], device: torch.device) -> float:
    if device.type == "cpu":
        started = time.process_time()
        work()
        return time.process_time() - started
    torch.cuda.synchronize(device)
    started = time.perf_counter()
    work()
    torch.cuda.synchronize(device)
    return time.perf_counter() - started


@contextmanager
def reading(model: Any, arch: ModelArch) -> Iterator[None]:
    """Every module that the sites of the default criteria hear is read once, in every forward pass inside."""
    from minitron_nemo.importance.hooks import decoder_layers

    with ExitStack() as attached:
        for layer in decoder_layers(model):
            for site in {site.name: site for criterion in CRITERIA.values() for site in criterion.sites}.values():
                if site is not QUERY_GROUPS:  # hears what the heads' site hears
                    plain = HEAD_CHANNELS if site is HEADS else site
                    attached.callback(plain.attach(layer, arch, lambda *heard: [x.sum(dim=0) for x in heard]).remove)
        yield


def compare(rank: Rank, name: str, aggregation: str, repeats: int, threads: int, gpu: bool) -> tuple[float, ...]:
    """Seconds of the fastest forward pass of a shape: bare, with what is heard read once, and hooked."""
    from minitron_nemo.engine.groups import form_groups
    from minitron_nemo.engine.model import BuildOptions, build_model
    from minitron_nemo.engine.schedule import forward_hidden
    from minitron_nemo.importance.hooks import listening

    torch.set_num_threads(threads)
    groups = form_groups(rank, Layout(), gpu=gpu)
    sizes, samples, tokens, dtype = (SHAPES | ON_GPU)[name]
    arch = arch_of(sizes, tokens)
    model = build_model(arch, BuildOptions(groups=groups, dtype=getattr(torch, dtype))).eval()
    batch = [{"tokens": random_batch(arch, samples=samples, seq_length=tokens)["tokens"].to(groups.device)}]

    def forward() -> float:
        return seconds(lambda: forward_hidden(model, batch), groups.device)

    bare, read, hooked = [], [], []
    for _ in range(repeats + 1):
        bare.append(forward())
        with reading(model, arch):
            read.append(forward())
        with listening(model, arch=arch, sequence_aggregation=aggregation, groups=groups):
            hooked.append(forward())
    return min(bare[1:]), min(read[1:]), min(hooked[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--aggregation", nargs="+", default=["mean"], choices=["mean", "l2", "variance"])
    gpu = torch.cuda.is_available()
    known = ON_GPU if gpu else SHAPES
    parser.add_argument("--shapes", nargs="+", default=list(known), choices=list(known))
    options = parser.parse_args()
    versions = (
        f"Python {platform.python_version()}, torch {torch.__version__}, megatron-core {version('megatron-core')}"
    )
    print(f"{date.today()}, {platform.machine()}, {options.threads} thread(s), {options.repeats} repeats, {versions}")
    bare_in_words = "bare s" if gpu else "bare CPU s"
    print(f"{'shape':<19}{'tokens':>8}{'aggregation':>13}{bare_in_words:>12}{'read':>8}{'hooked':>9}{'read/bare':>11}"
          f"{'hooked/bare':>13}")  # fmt: skip
    for name in options.shapes:
        for how in options.aggregation:
            work = (name, how, options.repeats, options.threads, gpu)
            bare, read, hooked = run_on_ranks(compare, *work, num_ranks=1, gpu=gpu)
            _, samples, length, _ = known[name]
            tokens = samples * length
            print(f"{name:<19}{tokens:>8}{how:>13}{bare:>12.3f}{read:>8.3f}{hooked:>9.3f}{read / bare:>11.3f}"
                  f"{hooked / bare:>13.3f}", flush=True)  # fmt: skip
            if gpu:
                print(f"  {SAMPLES} samples of {length} tokens: {hooked * SAMPLES / samples:.0f} s")


if __name__ == "__main__":
    main()
