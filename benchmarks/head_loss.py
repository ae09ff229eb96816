"""Time and peak memory of the chunked head loss beside the textbook one that holds all logits.

    python benchmarks/head_loss.py [--tokens 4096] [--vocab 32768] [--hidden 512] [--repeats 3]

Both compute the forward KL between two heads and its gradients with respect to the student's hidden states and
weight. Each runs in a process of its own, so that peak memory (of the process on CPU, of the allocator on GPU) is its
own; the table prints ratios to the textbook loss, measured in the same run. The first ratio is of CPU seconds of the
process, which others on the machine disturb less than the clock; it means little where a GPU does the work.
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

from minitron_nemo.losses.lm_head import HeadLoss

Pair = tuple[Tensor, Tensor]


def textbook(student: Pair, teacher: Pair) -> Tensor:
    """Two whole matrices of logits, two log-softmaxes, and autograd."""
    log_q = log_softmax((student[0] @ student[1].T).float(), dim=1)
    log_p = log_softmax((teacher[0] @ teacher[1].T).float(), dim=1)
    return kl_div(log_q, log_p, reduction="sum", log_target=True)


def chunked(chunk_tokens: int) -> Callable[[Pair, Pair], Tensor]:
    def loss(student: Pair, teacher: Pair) -> Tensor:
        tokens, vocab = student[0].shape[0], student[1].shape[0]
        labels = torch.zeros(tokens, dtype=torch.long, device=student[0].device)
        head = HeadLoss(vocab_size=vocab, chunk_tokens=chunk_tokens)
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


LOSSES = {"textbook": textbook, "four products": products, **{f"chunked {n}": chunked(n) for n in (256, 1024)}}


def measure(name: str, tokens: int, vocab: int, hidden: int, repeats: int) -> tuple[float, float, float, float]:
    """(seconds, CPU seconds, bytes at the peak above the inputs, loss) of one alternative."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    student = [torch.randn(n, hidden, device=device, dtype=dtype).div_(8).requires_grad_() for n in (tokens, vocab)]
    teacher = [torch.randn(n, hidden, device=device, dtype=dtype).div_(8) for n in (tokens, vocab)]
    before = peak_bytes(device)
    times, cpu = [], []
    for _ in range(repeats):
        for tensor in student:
            tensor.grad = None
        started, cpu_started = time.perf_counter(), time.process_time()
        loss = LOSSES[name]((student[0], student[1]), (teacher[0], teacher[1]))
        loss.backward()
        value = float(loss.detach())
        times.append(time.perf_counter() - started)
        cpu.append(time.process_time() - cpu_started)
    return sorted(times)[repeats // 2], sorted(cpu)[repeats // 2], peak_bytes(device) - before, value


def peak_bytes(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("tokens", 4096), ("vocab", 32768), ("hidden", 512), ("repeats", 3)):
        parser.add_argument(f"--{name}", type=int, default=value)
    options = vars(parser.parse_args())
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
    print(f"{date.today()}, {device}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(", ".join(f"{name} {value}" for name, value in options.items()))
    print(f"{'loss':<14}{'seconds':>9}{'CPU s':>9}{'ratio':>8}{'peak MiB':>10}{'ratio':>8}{'value':>14}")
    rows = {}
    for name in LOSSES:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            rows[name] = pool.apply(measure, (name, *options.values()))
    base = rows["textbook"]
    for name, (seconds, cpu, memory, value) in rows.items():
        print(
            f"{name:<14}{seconds:>9.3f}{cpu:>9.3f}{cpu / base[1]:>8.2f}{memory / 2**20:>10.0f}"
            f"{memory / base[2]:>8.2f}{value:>14.4f}"
        )


if __name__ == "__main__":
    main()
