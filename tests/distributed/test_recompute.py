"""Activations that are computed again, or wait in the host's memory: every loss and gradient stays the same.

To the bit; of what was offloaded, to the rounding of operations on views that come back dense.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from layouts import samples
from torch import Tensor

from minitron_nemo.checkpoint.formats.nemo import open_nemo
from minitron_nemo.config.parallel import Recompute
from minitron_nemo.config.schema import OptimConfig
from minitron_nemo.distributed.groups import Groups
from minitron_nemo.distributed.layout import Layout
from minitron_nemo.engine import offload
from minitron_nemo.engine.model import BuildOptions, build_model
from minitron_nemo.engine.weights import load_weights
from minitron_nemo.losses.lm_head import HeadLoss
from minitron_nemo.shape.tensors import logical_tensors
from minitron_nemo.steps.memory import TOLERANCE, kept_by_layer
from minitron_nemo.testing import LLAMA, random_nemo, run_layout
from minitron_nemo.training.objectives import LanguageModelObjective, batch_sums
from minitron_nemo.training.state import TrainState

MODULES = {"attention": "self_attention.core_attention", "mlp": "mlp.linear_fc2", "norm": "input_layernorm"}
# How often each of MODULES runs in a step over one micro-batch, for a model of four layers.
CASES = {
    Recompute(): {"attention": 4, "mlp": 4, "norm": 4},
    Recompute("full", "uniform", 1): {"attention": 8, "mlp": 8, "norm": 8},
    Recompute("full", "uniform", 2): {"attention": 8, "mlp": 8, "norm": 8},
    Recompute("full", "block", 1): {"attention": 5, "mlp": 5, "norm": 5},
    Recompute("selective", modules=("core_attn",)): {"attention": 8, "mlp": 4, "norm": 4},
    Recompute("selective", modules=("mlp",)): {"attention": 4, "mlp": 8, "norm": 4},
    Recompute("selective", modules=("core_attn", "mlp")): {"attention": 8, "mlp": 8, "norm": 4},
}
OFFLOADED = 3  # layers of those four


class Saved:
    """Counts elements that the backward pass keeps, by the hooks that say where: in the host, or where they are."""

    def __init__(self) -> None:
        self.in_host = self.left = 0
        self._hooks = torch.autograd.graph.saved_tensors_hooks

    def hooks(self, pack: Callable, unpack: Callable) -> Any:
        def counted(x: Tensor) -> Any:
            kept = pack(x)
            if isinstance(kept, tuple):
                assert kept[1].data_ptr() != x.data_ptr()
                self.in_host += x.numel()
            else:
                self.left += x.numel()
            return kept

        return self._hooks(counted, unpack)


def steps(groups: Groups, path: Path) -> tuple[list[tuple[dict[str, int], dict[str, float], bool]], tuple[int, int]]:
    """For each case, and one that offloads, the calls of MODULES, the sums, and whether every gradient on every rank is
    that of the first case; and the elements that offloading put into the host's memory and left.
    """
    source, found, wanted, saved = open_nemo(path), [], None, Saved()
    head = HeadLoss(vocab_size=131, kl_weight=0.0, cross_entropy_weight=1.0, group=groups.tp)
    batch = samples(source.arch, first=0, count=2, seq_length=16)
    offload.SMALLEST = 1
    torch.autograd.graph.saved_tensors_hooks = saved.hooks  # type: ignore[assignment, misc]
    for recompute, offloaded in [*((case, 0) for case in CASES), (Recompute(), OFFLOADED)]:
        saved.in_host = saved.left = 0
        options = BuildOptions(
            groups=groups, recompute=recompute, cpu_offloading_num_layers=offloaded, distributed_optimizer=False
        )
        model = build_model(source.arch, options)
        load_weights(model, source.weights, groups)
        calls = dict.fromkeys(MODULES, 0)

        def count(*_, calls=calls, name=""):
            calls[name] += 1

        for layer in model[0].decoder.layers:
            for name, module in MODULES.items():
                layer.get_submodule(module).register_forward_hook(lambda *_, name=name: count(name=name))
        state = TrainState.start(model, OptimConfig(), max_steps=2, options=options)
        state.zero_gradients()
        sums = batch_sums(state.model, [batch], LanguageModelObjective(head), groups=groups, train=True)
        gradients = [parameter.main_grad.clone() for parameter in state.model.parameters()]
        wanted = wanted or gradients
        tolerance = dict(rtol=1e-5, atol=1e-7) if offloaded else dict(rtol=0.0, atol=0.0)
        same = all(torch.allclose(*both, **tolerance) for both in zip(gradients, wanted, strict=True))
        found.append((calls, sums, all(groups.share_json(same))))
    return found, (saved.in_host, saved.left)


def test_what_is_recomputed_or_offloaded_changes_nothing(tmp_path):
    """Where each rank has a part of every sequence, so that recomputed attention gathers the keys again."""
    path = random_nemo(tmp_path / "model.nemo", LLAMA).path
    found, (in_host, left) = run_layout(steps, Layout(cp=2), path)
    cases = [*CASES.items(), ("offloaded", CASES[Recompute()])]
    for (case, wanted), (calls, sums, same) in zip(cases, found, strict=True):
        assert calls == wanted, case
        assert sums == found[0][1], case
        assert same, case
    weights = sum(math.prod(t.shape(LLAMA)) for t in logical_tensors(LLAMA).values() if t.layer in range(OFFLOADED))
    assert weights * 0.9 <= left <= weights * 1.1, "a product keeps its weight, which is where it is anyway"
    tokens = 2 * 16 // 2
    assert in_host >= OFFLOADED * tokens * kept_by_layer(LLAMA, Layout(cp=2)) * (1 - TOLERANCE)
