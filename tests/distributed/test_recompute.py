"""Activation recomputation: what is said to be computed again is, and every loss and gradient stays the same bit."""

from pathlib import Path

from layouts import samples

from minitron_nemo.checkpoint.formats.nemo import open_nemo
from minitron_nemo.config.parallel import Recompute
from minitron_nemo.config.schema import OptimConfig
from minitron_nemo.distributed.groups import Groups
from minitron_nemo.distributed.layout import Layout
from minitron_nemo.engine.model import BuildOptions, build_model
from minitron_nemo.engine.weights import load_weights
from minitron_nemo.losses.lm_head import HeadLoss
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


def steps(groups: Groups, path: Path) -> list[tuple[dict[str, int], dict[str, float], bool]]:
    """For each case the calls of MODULES, the sums, and whether every gradient on every rank is that of the first."""
    source, found, wanted = open_nemo(path), [], None
    head = HeadLoss(vocab_size=131, kl_weight=0.0, cross_entropy_weight=1.0, group=groups.tp)
    batch = samples(source.arch, first=0, count=2, seq_length=16)
    for recompute in CASES:
        options = BuildOptions(groups=groups, recompute=recompute, distributed_optimizer=False)
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
        same = all(bool((ours == theirs).all()) for ours, theirs in zip(gradients, wanted, strict=True))
        found.append((calls, sums, all(groups.share_json(same))))
    return found


def test_what_is_recomputed_changes_no_bit(tmp_path):
    """Where each rank has a part of every sequence, so that recomputed attention gathers the keys again."""
    path = random_nemo(tmp_path / "model.nemo", LLAMA).path
    found = run_layout(steps, Layout(cp=2), path)
    for (recompute, wanted), (calls, sums, same) in zip(CASES.items(), found, strict=True):
        assert calls == wanted, recompute
        assert sums == found[0][1], recompute
        assert same, recompute
