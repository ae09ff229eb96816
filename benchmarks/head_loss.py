"""Time, memory and error of the chunked head loss beside other ways to the same forward KL and gradients.

    python benchmarks/head_loss.py [--tokens 4096] [--vocab 32768] [--hidden 512] [--repeats 3]

All compute the forward KL between two heads and its gradients with respect to the student's hidden states and weight.
Each runs in a process of its own, so that peak memory (of the process on CPU, of the allocator on GPU) is its own.
`x floor` is over the four matrix products that any such loss needs, measured in the same run: in CPU seconds of the
process, which others on the machine disturb less than the clock, on a GPU in seconds; the best of the repeats. `error`
is that of the gradient of 64 tokens' hidden states, over its size, against float64. What is not there is named with the
reason: `torch.compile` needs a C++ compiler on a CPU; Liger is the extra `bench`; ModelOpt is in `.venv-oracle`.
"""

import argparse
import multiprocessing
import platform
import resource
import time
from collections.abc import Callable
from datetime import date

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

from minitron_nemo.losses.divergences.forward_kl import ForwardKL
from minitron_nemo.losses.divergences.known import KNOWN
from minitron_nemo.losses.lm_head import HeadLoss

Pair = tuple[Tensor, Tensor]
Loss = Callable[[Pair, Pair], Tensor]
CHECKED = 64  # tokens whose gradient is compared with float64


def textbook(student: Pair, teacher: Pair) -> Tensor:
    """Two whole matrices of logits, two log-softmaxes, and autograd."""
    log_q = log_softmax((student[0] @ student[1].T).float(), dim=1)
    log_p = log_softmax((teacher[0] @ teacher[1].T).float(), dim=1)
    return kl_div(log_q, log_p, reduction="sum", log_target=True)


def compiled() -> Loss:
    return torch.compile(textbook)


def liger() -> Loss:
    """Its chunked loss over both heads; with beta 0 it is the forward KL, and a mean over tokens."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    whole = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, compiled=False)

    def loss(student: Pair, teacher: Pair) -> Tensor:
        labels = torch.zeros(len(student[0]), dtype=torch.long, device=student[0].device)
        return whole(*student, *teacher, labels) * len(labels)

    return loss


def modelopt() -> Loss:
    """Its loss on the logits of a head that Megatron-Core splits over ranks, here over one."""
    from modelopt.torch.distill.plugins.megatron import LogitsKLLoss  # type: ignore[import-not-found]

    from minitron_nemo.distributed.layout import Layout
    from minitron_nemo.distributed.ranks import Rank
    from minitron_nemo.engine.groups import form_groups
    from minitron_nemo.engine.model import BuildOptions, transformer_config
    from minitron_nemo.testing import LLAMA

    groups = form_groups(Rank(0, 0, 1), Layout(), gpu=torch.cuda.is_available())
    whole = LogitsKLLoss(transformer_config(LLAMA, BuildOptions(groups=groups)))

    def loss(student: Pair, teacher: Pair) -> Tensor:
        student_NV, teacher_NV = student[0] @ student[1].T, teacher[0] @ teacher[1].T
        found = whole(student_NV[:, None], teacher_NV[:, None])
        return (found[0] if isinstance(found, tuple) else found).sum()

    return loss


def chunked(chunk_tokens: int, name: str = "forward_kl") -> Loss:
    divergence = KNOWN[name]()

    def loss(student: Pair, teacher: Pair) -> Tensor:
        tokens, vocab = student[0].shape[0], student[1].shape[0]
        labels = torch.zeros(tokens, dtype=torch.long, device=student[0].device)
        head = HeadLoss(vocab_size=vocab, chunk_tokens=chunk_tokens, divergence=divergence)
        return head(student, teacher, labels_N=labels, mask_N=torch.ones_like(labels).float()).total

    return loss


class _Products(torch.autograd.Function):
    """Both models' logits and the two gradients, chunk by chunk, with nothing between them."""

    @staticmethod
    def forward(ctx, x, w, tx, tw):  # type: ignore[no-untyped-def]
        dx, dw = torch.empty_like(x), torch.zeros_like(w)
        for start in range(0, len(x), 1024):
            rows = slice(start, start + 1024)
            logits, _ = x[rows] @ w.T, tx[rows] @ tw.T
            dx[rows] = logits @ w
            dw.addmm_(logits.T, x[rows])
        ctx.save_for_backward(dx, dw)
        return dx.new_zeros(())

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return *ctx.saved_tensors, None, None


def products(student: Pair, teacher: Pair) -> Tensor:
    """The floor: no loss can do with fewer matrix products than these four."""
    return _Products.apply(*student, *teacher)


FLOOR = "four products"
LOSSES: dict[str, Callable[[], Loss]] = {
    FLOOR: lambda: products,
    "plain torch": lambda: textbook,
    "torch.compile": compiled,
    "Liger": liger,
    "ModelOpt": modelopt,
    **{f"chunked {n}": lambda n=n: chunked(n) for n in (256, 1024, 4096)},  # type: ignore[misc]
}
OTHERS = {name: lambda name=name: chunked(1024, name) for name in KNOWN if name != ForwardKL.name}


def measure(name: str, tokens: int, vocab: int, hidden: int, repeats: int) -> tuple[float, float, float, float] | str:
    """(seconds, CPU seconds, bytes at the peak above the inputs, error) of one way; or why it was not measured."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    x, w = (torch.randn(n, hidden, device=device, dtype=dtype).div_(8).requires_grad_() for n in (tokens, vocab))
    teacher = tuple(torch.randn(n, hidden, device=device, dtype=dtype).div_(8) for n in (tokens, vocab))
    before = peak_bytes(device)
    times, cpu = [], []
    try:
        loss = {**LOSSES, **OTHERS}[name]()
        for _ in range(repeats + 1):  # the first one is not counted: it may compile
            x.grad = w.grad = None
            started, cpu_started = time.perf_counter(), time.process_time()
            total = loss((x, w), teacher)
            total.backward()
            float(total.detach())
            times.append(time.perf_counter() - started)
            cpu.append(time.process_time() - cpu_started)
    except Exception as error:  # whatever another library is lacking
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:70]
    memory = peak_bytes(device) - before
    is_this_loss = name != FLOOR and name not in OTHERS
    return min(times[1:]), min(cpu[1:]), memory, error_of(x, w, teacher) if is_this_loss else float("nan")


def error_of(x: Tensor, w: Tensor, teacher: Pair) -> float:
    """How far the gradient of the first tokens is from that in float64, over its size."""
    rows = x[:CHECKED].detach().double().requires_grad_()
    want = torch.autograd.grad(textbook_in_float64(rows, w.detach().double(), teacher), rows)[0]
    assert x.grad is not None
    return float((x.grad[:CHECKED].double() - want).norm() / want.norm())


def textbook_in_float64(x: Tensor, w: Tensor, teacher: Pair) -> Tensor:
    log_q = log_softmax(x @ w.T, dim=1)
    log_p = log_softmax(teacher[0][:CHECKED].double() @ teacher[1].double().T, dim=1)
    return kl_div(log_q, log_p, reduction="sum", log_target=True)


def peak_bytes(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("tokens", 4096), ("vocab", 32768), ("hidden", 512), ("repeats", 3)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--only", help="names of rows, with commas between; the floor is always measured")
    options = vars(parser.parse_args())
    only = (options.pop("only") or ",".join({**LOSSES, **OTHERS})).split(",")
    on_gpu = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if on_gpu else f"{platform.machine()} CPU"
    print(f"{date.today()}, {device}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(", ".join(f"{name} {value}" for name, value in options.items()))
    print(f"{'loss':<16}{'seconds':>9}{'CPU s':>9}{'x floor':>9}{'peak MiB':>10}{'error':>10}", flush=True)
    floor: float | None = None
    for name in (FLOOR, *(name for name in only if name != FLOOR)):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            row = pool.apply(measure, (name, *options.values()))
        if isinstance(row, str):
            print(f"{name:<16} not measured: {row}", flush=True)
            continue
        seconds, cpu, memory, error = row
        floor = floor or (seconds if on_gpu else cpu)
        ratio = (seconds if on_gpu else cpu) / floor
        print(
            f"{name:<16}{seconds:>9.3f}{cpu:>9.3f}{ratio:>9.2f}{memory / 2**20:>10.0f}"
            f"{'' if error != error else f'{error:.1e}':>10}",
            flush=True,
        )


if __name__ == "__main__":
    main()
