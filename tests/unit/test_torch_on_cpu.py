"""On the CPU nothing of Transformer Engine or Apex runs, though they are installed; nor does an import start CUDA."""

import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from minitron_nemo.distributed.launch import PRELOADED, run_on_ranks, start_method

ROOT = Path(__file__).resolve().parents[2]
# A package that has every module and every name; whoever makes or calls one of them fails.
STAND_IN = """
import importlib, importlib.abc, importlib.machinery, sys, types
NAMES = ("transformer_engine", "transformer_engine_torch", "apex", "amp_C")

class Made(type):
    def __getattr__(self, name):
        if name.startswith("_"):
            raise AttributeError(name)
        return refuse

def refuse(*args, **kwargs):
    raise AssertionError("it is used")

class Module(types.ModuleType):
    __path__ = []
    __version__ = "2.9.0"
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        if name in ("pytorch", "ops", "common", "recipe"):
            return importlib.import_module(f"{self.__name__}.{name}")
        made = Made(name, (), {"__init__": refuse, "__module__": self.__name__})
        setattr(self, name, made)
        return made

class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in FOUND:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
    def create_module(self, spec):
        return Module(spec.name)
    def exec_module(self, module):
        pass

FOUND = {"te": NAMES[:2], "apex": NAMES[2:]}[__import__("os").environ["STAND_IN"]]
sys.meta_path.insert(0, Finder())
"""
TRAIN = (
    f"""
import importlib, torch
def refuse(*args, **kwargs):
    raise AssertionError("CUDA is started")
torch.cuda._lazy_init = torch._C._cuda_init = refuse
for name in {PRELOADED!r}:
    importlib.import_module(name)
assert not torch.cuda.is_initialized()
"""
    """
import megatron.core.optimizer as optimizer
before = optimizer.Adam.__module__
from minitron_nemo.config.schema import OptimConfig
from minitron_nemo.distributed.ranks import Rank
from minitron_nemo.engine.groups import form_groups
from minitron_nemo.engine.model import BuildOptions, build_model, engine_choice
from minitron_nemo.losses.lm_head import HeadLoss
from minitron_nemo.testing import ALONE, LLAMA, random_batch
from minitron_nemo.training.objectives import LanguageModelObjective, batch_sums
from minitron_nemo.training.state import TrainState

groups = form_groups(Rank(0, 0, 1), ALONE)
options = BuildOptions(groups=groups)
model = build_model(LLAMA, options)
for parameter in model.parameters():
    parameter.data.normal_(std=0.1)
for distributed in (True, False):
    optim = OptimConfig(gradient_clip_val=1e-3)
    options = BuildOptions(groups=groups, distributed_optimizer=distributed)
    state = TrainState.start(model, optim, max_steps=2, options=options)
    head = HeadLoss(vocab_size=LLAMA.vocab_size, kl_weight=0.0, cross_entropy_weight=1.0)
    state.zero_gradients()
    batch_sums(state.model, [random_batch(LLAMA, samples=1)], LanguageModelObjective(head), groups=groups, train=True)
    assert state.step() > 1e-3, "clipped"
    print(before, "|", engine_choice(groups.device, options.dtype, state.optimizer))
    model.zero_grad()
"""
)


@pytest.mark.parametrize(
    ("stand_in", "theirs"), [("te", "transformer_engine.pytorch.optimizers"), ("apex", "apex.optimizers")]
)
def test_what_the_fork_server_imports_starts_no_cuda_and_torch_trains_as_the_log_says(stand_in, theirs, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(STAND_IN)
    (tmp_path / "train.py").write_text(TRAIN)
    result = subprocess.run(
        [sys.executable, "-W", "ignore", str(tmp_path / "train.py")], capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}", "STAND_IN": stand_in, "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    choice = "engine: Megatron-Core on cpu, torch layers with scaled_dot_product_attention, torch AdamW, float32"
    assert result.stdout.splitlines() == [f"{theirs} | {choice}"] * 2


def number_of(rank):
    return rank.world_size, multiprocessing.get_start_method(allow_none=True)


def test_spawned_ranks_answer():
    assert run_on_ranks(number_of, num_ranks=2, gpu=True) == (2, "spawn")


def test_ranks_with_gpus_are_spawned_and_those_without_forked_from_a_server():
    assert start_method(gpu=True).get_start_method() == "spawn"
    assert start_method(gpu=False).get_start_method() == "forkserver"
    assert torch.cuda.is_initialized() is False
