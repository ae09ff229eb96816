"""Triton's kernels, interpreted, compute what torch does, and compile for two GPUs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernel_cases import CASES, ROTATIONS, answer, rotation

from minitron_nemo.losses.kernels.choice import kernel_for
from minitron_nemo.losses.kernels.torch_kernel import TorchKernel

TESTS = Path(__file__).parents[1]
TARGETS = {80: "A100", 90: "H100 and H200"}


def test_a_cpu_runs_the_kernels_of_torch():
    assert kernel_for(torch.device("cpu")) is TorchKernel


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    """What the kernels of both softmaxes and of rotary embeddings make of their cases."""
    pytest.importorskip("triton", reason="triton is in the extra `dev`, and comes with torch for CUDA")
    path = tmp_path_factory.mktemp("triton") / "answers.pt"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": f"{TESTS.parent}:{TESTS}"}
    subprocess.run([sys.executable, str(TESTS / "kernel_cases.py"), str(path)], env=environment, check=True)
    return torch.load(path, weights_only=True)


def test_triton_turns_heads_as_the_formula_does(interpreted):
    def by_formula(x, angles):
        """Every pair of channels (i, i + R/2) as a complex number would be, were the two angles one."""
        x, half = x.double(), angles.shape[-1] // 2
        (f_1, f_2), (x_1, x_2) = angles.double().split(half, -1), x[..., : 2 * half].split(half, -1)
        parts = [x_1 * f_1.cos() - x_2 * f_1.sin(), x_2 * f_2.cos() + x_1 * f_2.sin(), x[..., 2 * half :]]
        return torch.cat(parts, -1)

    def by_megatron(x, angles):
        from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd

        return _apply_rotary_pos_emb_bshd(x, angles)

    for case, (turned, grad) in zip(ROTATIONS, interpreted[1], strict=True):
        *_, dtype = case
        assert turned.dtype == dtype
        for reference, bf16 in ((by_formula, 1e-2), (by_megatron, 3e-2)):
            tolerance = 1e-5 if dtype == torch.float32 else bf16
            want, want_grad = rotation(reference, case)
            torch.testing.assert_close(turned.double(), want.double(), rtol=tolerance, atol=tolerance)
            torch.testing.assert_close(grad.double(), want_grad.double(), rtol=tolerance, atol=tolerance)


def test_triton_computes_what_torch_does(interpreted):
    for case, (stats, grad) in zip(CASES, interpreted[0], strict=True):
        want, want_grad = answer(TorchKernel, case)
        *_, valid, dtype = case
        assert grad.dtype == dtype
        if valid == 0:
            want[:, [1, 2, 6, 7, 8]] = 0.0  # torch sums up padding where there is nothing else; it weighs nothing
        torch.testing.assert_close(stats, want, rtol=2e-6, atol=2e-6, msg=lambda text: f"{case}: {text}")  # noqa: B023
        tolerance = dict(rtol=1e-5, atol=1e-6) if dtype == torch.float32 else dict(rtol=1e-2, atol=1e-6)
        torch.testing.assert_close(grad.float(), want_grad, **tolerance, msg=lambda text: f"{case}: {text}")  # noqa: B023
        assert not grad[:, valid:].any(), "padding has no gradient"


@pytest.mark.parametrize("capability", TARGETS, ids=TARGETS.get)
def test_all_kernels_of_triton_compile_down_to_machine_code(capability, tmp_path, monkeypatch):
    """With the blocks and warps that run; no GPU is needed for it."""
    triton = pytest.importorskip("triton", reason="triton is in the extra `dev`, and comes with torch for CUDA")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from minitron_nemo.engine import rope_kernel
    from minitron_nemo.losses.kernels import triton_kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    types = {
        "s_NV": "*bf16", "t_NV": "*bf16", "labels_N": "*i64", "stats_NC": "*fp32", "factors_NF": "*fp32",
        "inverse_tau": "fp32", "x_SBHD": "*bf16", "out_SBHD": "*bf16", "cos_SR": "*fp32", "sin_SR": "*fp32",
    }  # fmt: skip
    of_logits = {
        "TEACHER": True, "TEMPERED": False, "COLUMNS": 10, "FACTORS": 6, "DIVERGENCE": True, "CROSS_ENTROPY": True,
        "BLOCK": triton_kernel.BLOCK,
    }  # fmt: skip
    of_heads = {"BACK": True, "HEADS": rope_kernel.HEADS, "HALF": 64, "CHANNELS": 128}
    for kernel, constants, warps in (
        (triton_kernel.statistics_kernel, of_logits, triton_kernel.WARPS),
        (triton_kernel.gradient_kernel, of_logits, triton_kernel.WARPS),
        (rope_kernel.rotate_kernel, of_heads, rope_kernel.WARPS),
    ):
        names = kernel.arg_names
        signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
        compiled = triton.compile(
            ASTSource(kernel, signature, {(names.index(k),): v for k, v in constants.items() if k in names}),
            target=GPUTarget("cuda", capability, 32),
            options={"num_warps": warps},
        )
        assert compiled.asm["cubin"]
        assert f".target sm_{capability}" in compiled.asm["ptx"]
        assert ".local" not in compiled.asm["ptx"], "all of a block is kept in registers"
