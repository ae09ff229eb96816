"""A whole distillation step (teacher forward, student forward and backward, AdamW) beside one in plain PyTorch.

    python benchmarks/distillation_step.py [--shapes quickstart] [--steps 20] [--threads 1]

Plain PyTorch is two transformers models, the loss over whole logits, clip_grad_norm_ and torch.optim.AdamW. Each
alternative has a process of its own; they take turns, and a round's time is the median of its steps after the first
three. `cross-entropy` is our step without a teacher. On a GPU the shapes are the published ones, in bf16 with
activations recomputed, and the share of peak counts the model's matrix products alone, recomputation left out.
"""

import argparse
import dataclasses
import multiprocessing
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version

import torch

from minitron_nemo.config.parallel import Recompute
from minitron_nemo.config.schema import OptimConfig
from minitron_nemo.distributed.launch import run_on_ranks
from minitron_nemo.distributed.layout import Layout
from minitron_nemo.distributed.ranks import Rank
from minitron_nemo.shape.arch import ModelArch
from minitron_nemo.testing import random_batch
from minitron_nemo.training.metrics import peak_flops

WARMUP = 3  # steps that are not counted
OPTIM = OptimConfig(lr=1e-4, min_lr=1e-5)


@dataclass(frozen=True)
class Shape:
    """Teacher and student, and what a step takes."""

    teacher: ModelArch
    student: ModelArch
    micro_batch: int
    seq_length: int
    dtype: torch.dtype = torch.float32

    @property
    def tokens(self) -> int:
        return self.micro_batch * self.seq_length


QUICKSTART = ModelArch(num_layers=6, hidden_size=128, ffn_hidden_size=384, num_attention_heads=4, num_query_groups=2,
                       kv_channels=32, vocab_size=2048, seq_length=512)  # fmt: skip
MIDDLE = ModelArch(num_layers=4, hidden_size=512, ffn_hidden_size=1792, num_attention_heads=8, num_query_groups=4,
                   kv_channels=64, vocab_size=8192, seq_length=512)  # fmt: skip
LLAMA31 = ModelArch(num_layers=32, hidden_size=4096, ffn_hidden_size=14336, num_attention_heads=32, num_query_groups=8,
                    kv_channels=128, vocab_size=128256, seq_length=8192, rotary_base=500000.0)  # fmt: skip


def cut(arch: ModelArch, **sizes: int) -> ModelArch:
    return dataclasses.replace(arch, **sizes)  # type: ignore[arg-type]


SHAPES = {
    "quickstart": Shape(QUICKSTART, cut(QUICKSTART, hidden_size=96, ffn_hidden_size=256), 8, 256),
    "hidden 512": Shape(MIDDLE, cut(MIDDLE, hidden_size=384, ffn_hidden_size=1152), 1, 512),
}
GPU_SHAPES = {
    "Llama-3.1 width": Shape(LLAMA31, cut(LLAMA31, hidden_size=3072, ffn_hidden_size=9216), 1, 8192, torch.bfloat16),
    "Llama-3.1 depth": Shape(LLAMA31, cut(LLAMA31, num_layers=16), 1, 8192, torch.bfloat16),
}


@dataclass(frozen=True)
class Measured:
    """Medians of a step's seconds, and bytes at the peak after the first and after the last counted step (GPU)."""

    seconds: float
    cpu_seconds: float
    first_peak: int = 0
    last_peak: int = 0


def timed(step: Callable[[int], object], steps: int) -> Measured:
    """Runs `step(number)` and keeps the time of all but the first few."""
    gpu = torch.cuda.is_initialized()
    rows, peaks = [], []
    for number in range(WARMUP + steps):
        started = time.perf_counter(), time.process_time()
        step(number)
        if gpu:
            torch.cuda.synchronize()
            peaks.append(torch.cuda.max_memory_allocated())
        rows.append((time.perf_counter() - started[0], time.process_time() - started[1]))
    clock, cpu = (statistics.median(column) for column in zip(*rows[WARMUP:], strict=True))
    return Measured(clock, cpu, *((peaks[WARMUP], peaks[-1]) if gpu else ()))


def ours(rank: Rank, shape: Shape, options: argparse.Namespace, with_teacher: bool) -> Measured:
    """The library's own step on random weights."""
    from minitron_nemo.checkpoint.random_init import RandomWeights
    from minitron_nemo.distillation.teacher import Teacher
    from minitron_nemo.engine.groups import form_groups
    from minitron_nemo.engine.model import BuildOptions, build_model
    from minitron_nemo.engine.weights import load_weights
    from minitron_nemo.losses.lm_head import HeadLoss
    from minitron_nemo.training.objectives import DistillationObjective, LanguageModelObjective, batch_sums
    from minitron_nemo.training.state import TrainState

    groups = form_groups(rank, Layout(), gpu=options.gpu)
    if not options.gpu:
        torch.set_num_threads(options.threads)
    build = BuildOptions(
        groups=groups, dtype=shape.dtype, recompute=Recompute("full", "uniform", 1) if options.gpu else Recompute()
    )
    model = build_model(shape.student, build)
    load_weights(model, RandomWeights(shape.student, seed=0), groups)
    state = TrainState.start(model, OPTIM, max_steps=1000, options=build)
    head = HeadLoss(vocab_size=shape.student.vocab_size, kl_weight=float(with_teacher),
                    cross_entropy_weight=float(not with_teacher))  # fmt: skip
    teacher = Teacher(RandomWeights(shape.teacher, seed=1), build) if with_teacher else None
    objective = DistillationObjective(head, teacher) if teacher else LanguageModelObjective(head)

    def step(number: int) -> None:
        batch = random_batch(shape.student, samples=shape.micro_batch, seq_length=shape.seq_length, seed=number)
        state.zero_gradients()
        on_device = {name: x.to(groups.device) for name, x in batch.items()}
        batch_sums(state.model, [on_device], objective, groups=groups, train=True)
        state.step()

    return timed(step, options.steps)


def plain(shape: Shape, options: argparse.Namespace) -> Measured:
    """The same step as anybody would write it."""
    from torch.nn import functional
    from transformers import LlamaConfig, LlamaForCausalLM

    device = torch.device("cuda" if options.gpu else "cpu")
    if not options.gpu:
        torch.set_num_threads(options.threads)

    def model_of(arch: ModelArch) -> LlamaForCausalLM:
        config = LlamaConfig(
            vocab_size=arch.vocab_size, hidden_size=arch.hidden_size, intermediate_size=arch.ffn_hidden_size,
            num_hidden_layers=arch.num_layers, num_attention_heads=arch.num_attention_heads, use_cache=False,
            num_key_value_heads=arch.num_query_groups, head_dim=arch.kv_channels, attn_implementation="sdpa",
        )  # fmt: skip
        return LlamaForCausalLM(config).to(device, shape.dtype)

    torch.manual_seed(0)
    student, teacher = model_of(shape.student).train(), model_of(shape.teacher).eval().requires_grad_(False)
    if options.gpu:
        student.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(student.parameters(), lr=OPTIM.lr, betas=tuple(OPTIM.betas), eps=OPTIM.eps)

    def step(number: int) -> None:
        batch = random_batch(shape.student, samples=shape.micro_batch, seq_length=shape.seq_length, seed=number)
        tokens, mask = batch["tokens"].to(device), batch["loss_mask"].to(device)
        optimizer.zero_grad()
        with torch.no_grad():
            log_p = functional.log_softmax(teacher(tokens).logits.float(), dim=-1)
        log_q = functional.log_softmax(student(tokens).logits.float(), dim=-1)
        divergence = functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(dim=-1)
        ((divergence * mask).sum() / mask.sum()).backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), OPTIM.gradient_clip_val)
        optimizer.step()

    return timed(step, options.steps)


def compare(name: str, shape: Shape, options: argparse.Namespace) -> None:
    """Each alternative in turn, `rounds` times; the row of each is its fastest round."""

    def by_rank(with_teacher: bool) -> Measured:
        return run_on_ranks(ours, shape, options, with_teacher, num_ranks=1, gpu=options.gpu)

    def by_hand() -> Measured:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            return pool.apply(plain, (shape, options))

    alternatives = {"ours": lambda: by_rank(True), "plain PyTorch": by_hand, "cross-entropy": lambda: by_rank(False)}
    rows: dict[str, list[Measured]] = {kind: [] for kind in alternatives}
    for _ in range(options.rounds):
        for kind, run in alternatives.items():
            rows[kind].append(run())
    best = {kind: min(measured, key=lambda one: one.cpu_seconds) for kind, measured in rows.items()}
    flops = 3 * shape.student.flops_per_token(shape.seq_length)
    with_teacher = flops + shape.teacher.flops_per_token(shape.seq_length)
    peak = peak_flops(torch.device("cuda")) if options.gpu else None
    for kind, row in best.items():
        used = shape.tokens * (flops if kind == "cross-entropy" else with_teacher) / row.seconds
        share = f"{used / peak:.1%}" if peak else "-"
        ratio = row.cpu_seconds / best["plain PyTorch"].cpu_seconds
        if options.gpu:
            ratio = row.seconds / best["plain PyTorch"].seconds
        print(
            f"{name:<17}{kind:<15}{row.seconds:>9.3f}{row.cpu_seconds:>9.3f}{ratio:>8.2f}"
            f"{shape.tokens / row.seconds:>10.0f}{share:>9}{row.first_peak / 1e9:>9.2f}{row.last_peak / 1e9:>8.2f}",
            flush=True,
        )


def main() -> None:
    gpu = torch.cuda.is_available()
    shapes = GPU_SHAPES if gpu else SHAPES
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list(shapes), choices=list(shapes))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="of torch, on a CPU")
    options = parser.parse_args()
    options.gpu = gpu
    device = torch.cuda.get_device_name() if gpu else f"{platform.machine()}, threads {options.threads}"
    print(
        f"{date.today()}, {device}, steps {options.steps}, Python {platform.python_version()}, "
        f"torch {torch.__version__}, megatron-core {version('megatron-core')}, transformers {version('transformers')}"
    )
    print(
        f"{'shape':<17}{'step':<15}{'seconds':>9}{'CPU s':>9}{'ratio':>8}{'tokens/s':>10}{'of peak':>9}"
        f"{'peak GB':>9}{'at end':>8}"
    )
    for name in options.shapes:
        compare(name, shapes[name], options)


if __name__ == "__main__":
    main()
