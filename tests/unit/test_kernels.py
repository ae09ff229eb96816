"""The kernels of both softmaxes: Triton's, interpreted, compute what torch's do, and compile for two GPUs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernel_cases import CASES, answer

from minitron_nemo.losses.kernels.choice import kernel_for
from minitron_nemo.losses.kernels.torch_kernel import TorchKernel

TESTS = Path(__file__).parents[1]
TARGETS = {80: "A100", 90: "H100 and H200"}


def test_a_cpu_runs_the_kernels_of_torch():
    assert kernel_for(torch.device("cpu")) is TorchKernel


def test_triton_computes_what_torch_does(tmp_path):
    pytest.importorskip("triton", reason="triton is in the extra `dev`, and comes with torch for CUDA")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": f"{TESTS.parent}:{TESTS}"}
    subprocess.run(
        [sys.executable, str(TESTS / "kernel_cases.py"), str(tmp_path / "a.pt")], env=environment, check=True
    )
    answers = torch.load(tmp_path / "a.pt", weights_only=True)
    for case, (stats, grad) in zip(CASES, answers, strict=True):
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
def test_both_kernels_of_triton_compile_down_to_machine_code(capability, tmp_path, monkeypatch):
    """With the blocks and warps that run; no GPU is needed for it."""
    triton = pytest.importorskip("triton", reason="triton is in the extra `dev`, and comes with torch for CUDA")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from minitron_nemo.losses.kernels import triton_kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    types = {"s_NV": "*bf16", "t_NV": "*bf16", "labels_N": "*i64", "stats_NC": "*fp32", "factors_NF": "*fp32",
             "inverse_tau": "fp32"}  # fmt: skip
    constants = {
        "TEACHER": True, "TEMPERED": False, "COLUMNS": 10, "FACTORS": 6, "DIVERGENCE": True, "CROSS_ENTROPY": True,
        "BLOCK": triton_kernel.BLOCK,
    }  # fmt: skip
    for kernel in (triton_kernel.statistics_kernel, triton_kernel.gradient_kernel):
        names = kernel.arg_names
        signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
        compiled = triton.compile(
            ASTSource(kernel, signature, {(names.index(k),): v for k, v in constants.items() if k in names}),
            target=GPUTarget("cuda", capability, 32),
            options={"num_warps": triton_kernel.WARPS},
        )
        assert compiled.asm["cubin"]
        assert f".target sm_{capability}" in compiled.asm["ptx"]
        assert ".local" not in compiled.asm["ptx"], "all of a block is kept in registers"
