"""Every criterion against plain PyTorch on a Hugging Face model, and in every layout against one rank."""

import pytest
import torch
from hf_models import save_tiny_hf
from torch.nn import functional
from transformers import AutoModelForCausalLM

from minitron_nemo.checkpoint.formats.hf import import_hf, open_hf
from minitron_nemo.checkpoint.formats.nemo import open_nemo
from minitron_nemo.checkpoint.source import stream
from minitron_nemo.data.calibration import CalibrationSet
from minitron_nemo.engine.model import BuildOptions
from minitron_nemo.importance.criteria import KNOWN, names_of
from minitron_nemo.pruning.make_plan import top_units
from minitron_nemo.steps.estimate import Estimate, estimate
from minitron_nemo.testing import ALONE, LAYOUTS, LLAMA, NEMOTRON, random_batch, random_nemo, run_layout

from layouts import ORIGIN  # isort: skip

SAMPLES, SEQ = 4, 8
AXES_SCORED = list(dict.fromkeys(criterion.axis for criterion in KNOWN))
# Runs that between them use every criterion: the first of each axis, the second, ...
RUNS = [
    {axis: ([c.name for c in KNOWN if c.axis == axis] * 6)[run] for axis in AXES_SCORED} for run in range(6)
]  # fmt: skip
# What is heard, each once: the layouts do not see what is made of it afterwards.
OTHER_SITES = {"hidden_size": "equal_layers_with_final_norm", "ffn_hidden_size": "before_activation",
               "num_attention_heads": "channel_norm", "num_query_groups": "token_norm"}  # fmt: skip
GRADIENTS = [dict.fromkeys(AXES_SCORED, name) for name in ("taylor", "loss_change")]
MIXED = OTHER_SITES | {"num_layers": "taylor", "num_attention_heads": "loss_change", "num_query_groups": "channel_norm"}


def scored(groups, jobs):
    """[{axis: scores}] of each run of each (checkpoint, tokens, runs), as arrays."""
    answers = []
    for path, tokens, runs in jobs:
        source = open_nemo(path)
        for names in runs:
            found = estimate(source.weights, CalibrationSet(tokens, "x"), Estimate(names, micro_batch_size=2),
                             options=BuildOptions(groups=groups))  # fmt: skip
            answers.append({axis: scores.numpy() for axis, scores in found.scores.by_axis.items()})
    return answers


def test_the_runs_use_every_criterion():
    assert {(axis, name) for run in RUNS for axis, name in run.items()} == {(c.axis, c.name) for c in KNOWN}
    assert all(len(set(names_of(axis))) == len(names_of(axis)) >= 3 for axis in RUNS[0])


def heard_in_torch(model, tokens):
    """Activations and gradients of one sample at every place, [s, units]: {name: [(a, g) of each layer]}."""
    seen = {}

    def keep(name, x):
        x.retain_grad()
        seen.setdefault(name, []).append(x)

    hooks = []
    for layer in model.model.layers:
        for name, norm in (("norm_1", layer.input_layernorm), ("norm_2", layer.post_attention_layernorm)):
            hooks.append(norm.register_forward_hook(lambda _, a, out, name=name: keep(name, out)))
        hooks.append(layer.self_attn.o_proj.register_forward_pre_hook(lambda _, a: keep("attention", a[0])))
        hooks.append(layer.mlp.down_proj.register_forward_pre_hook(lambda _, a: keep("neurons", a[0])))
        hooks.append(layer.mlp.gate_proj.register_forward_hook(lambda _, a, out: keep("gate", out)))
        hooks.append(layer.register_forward_pre_hook(lambda _, a: keep("before", a[0])))
        hooks.append(
            layer.register_forward_hook(lambda _, a, out: keep("after", out[0] if isinstance(out, tuple) else out))
        )
    hooks.append(model.model.norm.register_forward_hook(lambda _, a, out: keep("final", out)))
    logits = model(tokens[None]).logits[0]
    functional.cross_entropy(logits[:-1], tokens[1:], reduction="sum").backward()
    for hook in hooks:
        hook.remove()
    return {name: [(x.detach()[0], x.grad[0]) for x in xs] for name, xs in seen.items()}


class ByHand:
    """Scores by loops over samples and layers: mean over the tokens, l2 over the samples."""

    def __init__(self, model, tokens, arch):
        self.samples, self.arch = [heard_in_torch(model, row) for row in tokens], arch

    def per_layer(self, value):
        """[layers, units]: `value(sample, layer)` is one number for each unit of a sample."""
        return torch.stack([torch.stack([value(sample, layer) for sample in self.samples]).square().sum(0).sqrt()
                            for layer in range(self.arch.num_layers)])  # fmt: skip

    def activation(self, place):
        return self.per_layer(lambda sample, layer: sample[place][layer % len(sample[place])][0].abs().mean(0))

    def token_norm(self, count):
        return self.per_layer(lambda sample, layer: blocks(sample["attention"][layer][0], count).norm(dim=-1).mean(0))

    def cosine(self, layer):
        pairs = [(sample["before"][layer][0], sample["after"][layer][0]) for sample in self.samples]
        return torch.cat([functional.cosine_similarity(*pair, dim=-1) for pair in pairs]).mean()

    def gradients(self, place, count):
        """(`taylor`, `loss_change`) of the units of a place, each [layers, units]."""

        def products(sample, layer):
            activation, gradient = sample[place][layer]
            if place == "after":
                activation = activation - sample["before"][layer][0]
            return blocks(activation * gradient, count).sum(-1)

        return (self.per_layer(lambda sample, layer: products(sample, layer).abs().mean(0)),
                self.per_layer(lambda sample, layer: products(sample, layer).sum(0)))  # fmt: skip


def blocks(x, count):
    return x.unflatten(-1, (count, -1))


def evenly(*tables):
    return sum((table / table.mean(1, keepdim=True)).sum(0) for table in tables)


def by_hand(hand, arch):
    """{(axis, criterion): scores}"""
    heads, groups, width = arch.num_attention_heads, arch.num_query_groups, arch.hidden_size
    norms = [hand.activation("norm_1"), hand.activation("norm_2")]
    final, channels = hand.activation("final")[:1], hand.activation("attention")
    found = {
        ("num_layers", "cosine"): 1 - torch.stack([hand.cosine(layer) for layer in range(arch.num_layers)]),
        ("hidden_size", "norm_outputs"): sum(table.sum(0) for table in norms),
        ("hidden_size", "with_final_norm"): sum(table.sum(0) for table in (*norms, final)),
        ("hidden_size", "equal_layers"): evenly(*norms),
        ("hidden_size", "equal_layers_with_final_norm"): evenly(*norms, final),
        ("ffn_hidden_size", "after_activation"): hand.activation("neurons"),
        ("ffn_hidden_size", "before_activation"): hand.activation("gate"),
        ("num_attention_heads", "token_norm"): hand.token_norm(heads),
        ("num_attention_heads", "channel_norm"): blocks(channels, heads).norm(dim=-1),
        ("num_query_groups", "token_norm"): hand.token_norm(groups),
        ("num_query_groups", "channel_norm"): blocks(channels, groups).norm(dim=-1),
    }
    for number, name in enumerate(("taylor", "loss_change")):
        found["num_layers", name] = hand.gradients("after", 1)[number][:, 0]
        found["hidden_size", name] = sum(hand.gradients(place, width)[number].sum(0) for place in ("norm_1", "norm_2"))
        found["ffn_hidden_size", name] = hand.gradients("neurons", arch.ffn_hidden_size)[number]
        found["num_attention_heads", name] = hand.gradients("attention", heads)[number]
        found["num_query_groups", name] = hand.gradients("attention", groups)[number]
    return found


def test_every_criterion_is_its_formula_in_plain_pytorch(tmp_path):
    folder = save_tiny_hf(tmp_path / "hf", "llama", seed=3)
    source = open_hf(folder)
    import_hf(source, tmp_path / "m.nemo", tensors=stream(source.weights), origin=ORIGIN)
    arch = open_nemo(tmp_path / "m.nemo").arch
    tokens = random_batch(arch, samples=SAMPLES, seq_length=SEQ, seed=5)["tokens"]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    expected = by_hand(ByHand(model, tokens, arch), arch)
    assert expected.keys() == {(c.axis, c.name) for c in KNOWN}
    for names, found in zip(RUNS, run_layout(scored, ALONE, [(tmp_path / "m.nemo", tokens, RUNS)]), strict=True):
        for axis, scores in found.items():
            theirs = expected[axis, names[axis]].double()
            torch.testing.assert_close(torch.from_numpy(scores), theirs, rtol=2e-4, atol=1e-6 * float(theirs.max()),
                                       msg=lambda text, at=f"{axis} {names[axis]}": f"{at}: {text}")  # fmt: skip


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """(what is run: a gated model and one that is not, their scores on one rank)"""
    folder, jobs = tmp_path_factory.mktemp("models"), []
    for name, arch, runs in (("llama", LLAMA, [OTHER_SITES, *GRADIENTS]), ("nemotron", NEMOTRON, [MIXED])):
        path = random_nemo(folder / f"{name}.nemo", arch, scale=2.0).path
        jobs.append((path, random_batch(arch, samples=SAMPLES, seq_length=SEQ, seed=5)["tokens"], runs))
    return jobs, run_layout(scored, ALONE, jobs)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_criterion_scores_and_keeps_the_same_in_every_layout(layout, alone):
    jobs, expected = alone
    for run, (ours, theirs) in enumerate(zip(run_layout(scored, LAYOUTS[layout], jobs), expected, strict=True)):
        assert ours.keys() == theirs.keys() == set(AXES_SCORED)
        for axis in theirs:
            a, b = torch.from_numpy(ours[axis]), torch.from_numpy(theirs[axis])
            torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5 * float(b.max()),
                                       msg=lambda text, at=f"run {run}: {axis}": f"{at}: {text}")  # fmt: skip
            half = a.shape[-1] // 2
            for row, other in zip(a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1]), strict=True):
                assert top_units(row, half) == top_units(other, half), f"run {run}: {axis}"
