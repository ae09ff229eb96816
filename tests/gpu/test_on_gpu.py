"""pytest tests/gpu: what runs on the CPU gives the same on a GPU. Skipped, with the reason, where there is none."""

import pytest
import torch

from minitron_nemo.checkpoint.formats.nemo import open_nemo
from minitron_nemo.distributed.launch import run_on_ranks
from minitron_nemo.distributed.layout import Layout
from minitron_nemo.losses.divergences.forward_kl import ForwardKL
from minitron_nemo.losses.divergences.jensen_shannon import JensenShannon
from minitron_nemo.losses.divergences.top_k_kl import TopKKL
from minitron_nemo.losses.hidden_state import COSINE, MSE, HiddenStateLoss, StateNorm
from minitron_nemo.losses.kernels.choice import kernel_for
from minitron_nemo.losses.lm_head import HeadLoss
from minitron_nemo.pruning.plain_forward import plain_logits
from minitron_nemo.testing import TINY, random_batch, random_nemo

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def final_hidden(rank, path, gpu):
    """Final hidden states [s, b, h] of a checkpoint on one rank, in float32."""
    from minitron_nemo.engine.groups import form_groups
    from minitron_nemo.engine.model import BuildOptions, build_model
    from minitron_nemo.engine.schedule import forward_hidden
    from minitron_nemo.engine.weights import load_weights

    groups = form_groups(rank, Layout(), gpu=gpu)
    source = open_nemo(path)
    model = build_model(source.arch, BuildOptions(groups=groups)).eval()
    load_weights(model, source.weights, groups)
    tokens = random_batch(source.arch, samples=2)["tokens"].to(groups.device)
    return forward_hidden(model, [{"tokens": tokens}])[0].cpu().tolist()


def states_of_teachers(rank, path, settings):
    """Final states of a teacher by each of the settings, and whether its layers are on the GPU, as plain lists."""
    from minitron_nemo.config.teacher import TeacherParallelConfig
    from minitron_nemo.distillation.teacher import Teacher
    from minitron_nemo.engine.groups import form_groups
    from minitron_nemo.engine.model import BuildOptions

    groups = form_groups(rank, Layout(dp=rank.world_size), gpu=True)
    source, found = open_nemo(path), []
    tokens = random_batch(source.arch, samples=2, seed=rank.rank)["tokens"].to(groups.device)
    for values in settings:
        options = BuildOptions(groups=groups, dtype=torch.bfloat16)
        teacher = Teacher(source.weights, options, TeacherParallelConfig(**values))
        passes = [output.final.float().cpu() for output in teacher.outputs([{"tokens": tokens}] * 3)]
        held = [] if teacher.on_demand is None else [share.device.type for share in teacher.on_demand.shares]
        found.append(([state.tolist() for state in passes], held))
    return found


def test_a_teacher_in_host_memory_is_the_one_on_the_gpu_to_the_bit(tmp_path):
    random_nemo(tmp_path / "m.nemo", TINY["llama"])
    host = [{"cpu_offloading_weights": True, "prefetch_layers": ahead} for ahead in (0, 1, 2)]
    plain, *offloaded = run_on_ranks(states_of_teachers, tmp_path / "m.nemo", [{}, *host], num_ranks=1, gpu=True)
    for states, held in offloaded:
        assert states == plain[0]
        assert set(held) == {"cpu"}


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_teacher_shared_out_over_gpus_is_the_one_on_each_to_the_bit(tmp_path):
    random_nemo(tmp_path / "m.nemo", TINY["llama"])
    shared = [{"shard_weights": True, "cpu_offloading_weights": host} for host in (False, True)]
    plain, *others = run_on_ranks(states_of_teachers, tmp_path / "m.nemo", [{}, *shared], num_ranks=2, gpu=True)
    assert all(states == plain[0] for states, _ in others)


@pytest.mark.parametrize("family", TINY)
def test_hidden_states_on_gpu_equal_those_on_cpu(family, tmp_path):
    random_nemo(tmp_path / "m.nemo", TINY[family])
    cpu, gpu = (
        torch.tensor(run_on_ranks(final_hidden, tmp_path / "m.nemo", on_gpu, num_ranks=1, gpu=on_gpu))
        for on_gpu in (False, True)
    )
    torch.testing.assert_close(gpu, cpu, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("divergence", [COSINE, MSE])
def test_hidden_state_loss_on_gpu_equals_that_on_cpu(divergence, dtype):
    """Its gradient is computed again from the states in the backward pass."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(40, 2, width, generator=generator).to(dtype) for width in (48, 64))
    mapped, mask = torch.randn(64, 48, generator=generator) / 7, (torch.rand(40, 2, generator=generator) < 0.7).float()
    compare = HiddenStateLoss(divergence, StateNorm(False, 1e-5), StateNorm(True, 1e-5))
    results = []
    for device in ("cpu", "cuda"):
        x, weight = (tensor.to(device).requires_grad_() for tensor in (student, mapped))
        loss = compare(x, teacher.to(device), mask_SB=mask.to(device), map_GH=weight)
        loss.backward()
        results.append((loss.cpu(), x.grad.cpu().float(), weight.grad.cpu()))
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    for got, want in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("divergence", [ForwardKL(), JensenShannon(), TopKKL(top_k=20)], ids=str)
def test_head_loss_on_gpu_equals_that_on_cpu(divergence, dtype):
    """Forward KL by the kernels of Triton, the head's gradient by a product of bf16 matrices into float32."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = ([torch.randn(n, 64, generator=generator).to(dtype) / 4 for n in (50, 999)] for _ in range(2))
    labels, mask = torch.arange(50), torch.ones(50)
    results = []
    for device in ("cpu", "cuda"):
        x, w = (tensor.to(device).requires_grad_() for tensor in student)
        head = HeadLoss(vocab_size=990, chunk_tokens=16, divergence=divergence, temperature=2.0,
                        cross_entropy_weight=0.3)  # fmt: skip
        assert kernel_for(torch.device(device)).in_words == ("Triton" if device == "cuda" else "torch")
        beside = tuple(t.to(device) for t in teacher)
        loss = head((x, w), beside, labels_N=labels.to(device), mask_N=mask.to(device)).total
        loss.backward()
        results.append((loss.cpu(), x.grad.cpu().float(), w.grad.cpu().float()))
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    for got, want in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def said_by_nemos_model(rank, path, tokens):
    """Logits of a restored MinitronGPT and what it generates from the same tokens, as plain lists."""
    from minitron_nemo import MinitronGPT

    model = MinitronGPT.restore_from(path)
    assert {parameter.device.type for parameter in model.parameters()} == {"cuda"}
    with torch.no_grad():
        return model(tokens).cpu().tolist(), model.generate(tokens, max_new_tokens=8).cpu().tolist()


def test_nemos_model_on_gpu_says_what_plain_torch_says_on_cpu(tmp_path):
    source = random_nemo(tmp_path / "model.nemo", TINY["llama"])
    tokens = random_batch(source.arch, samples=2)["tokens"]
    logits, said = run_on_ranks(said_by_nemos_model, str(source.path), tokens, num_ranks=1, gpu=True)
    torch.testing.assert_close(torch.tensor(logits), plain_logits(source.weights, tokens), rtol=1e-4, atol=1e-4)
    for _ in range(8):
        tokens = torch.cat([tokens, plain_logits(source.weights, tokens)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(torch.tensor(said), tokens)
