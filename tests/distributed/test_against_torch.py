"""Training against plain PyTorch: transformers' Llama of the same weights and torch.optim.AdamW, written out here.

Losses, gradients, gradient norms, learning rates, validation and the weights after some steps; alone and on two ranks.
"""

import dataclasses
import json
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from anchor_world import World, as_hf, datasets_with_holes, make_world, own_cache, rows
from layouts import ORIGIN
from torch import Tensor
from torch.nn import functional

from minitron_nemo.checkpoint.formats.nemo import open_nemo
from minitron_nemo.config.hidden_states import HiddenStateDivergence, HiddenStateKind, HiddenStatesConfig
from minitron_nemo.config.parallel import ParallelConfig
from minitron_nemo.config.schema import OptimConfig, TrainingConfig
from minitron_nemo.distillation.teacher import Teacher
from minitron_nemo.distributed.groups import Groups
from minitron_nemo.distributed.layout import Layout
from minitron_nemo.engine.model import BuildOptions, build_model
from minitron_nemo.engine.weights import load_weights
from minitron_nemo.errors import UserError
from minitron_nemo.losses.lm_head import HeadLoss
from minitron_nemo.steps import train as training_step
from minitron_nemo.steps.hidden_states import hidden_states_of
from minitron_nemo.testing import ALONE, LAYOUTS, run_layout
from minitron_nemo.training.checkpoints import save_model
from minitron_nemo.training.objectives import DistillationObjective, LanguageModelObjective, batch_sums
from minitron_nemo.training.state import TrainState
from minitron_nemo.training.state_map import StateMap

# So high a peak and so strong a decay that leaving anything out shows after six steps; the limit of the gradient's
# norm lies between the norms of the steps, as clipping all of them alike would cancel in Adam.
OPTIM = OptimConfig(
    lr=1e-2, min_lr=2e-3, warmup_steps=2, weight_decay=0.4, betas=[0.8, 0.95], eps=1e-5, gradient_clip_val=1.8
)
TRAINING = TrainingConfig(
    max_steps=6, global_batch_size=8, micro_batch_size=2, optim=OPTIM, val_check_interval=3, limit_val_batches=2,
    save_every_n_steps=0,
)  # fmt: skip
SEED_OF_MAP = 11
BUCKET = 3000  # parameters: several for a model, the head's its own
MICRO = TRAINING.micro_batch_size
VALIDATED = TRAINING.limit_val_batches * TRAINING.global_batch_size


@dataclass(frozen=True)
class Minimized:
    """Weights of divergence and cross-entropy, the temperature, and how hidden states are compared, by which weight."""

    kl_weight: float
    cross_entropy_weight: float
    temperature: float
    hidden_states: HiddenStateDivergence | None = None
    hidden_weight: float | None = None


OBJECTIVES = {
    "cross-entropy": Minimized(0.0, 1.0, 1.0),
    "distillation": Minimized(2.1, 0.9, 2.0),
    "hidden states": Minimized(2.1, 0.9, 2.0, HiddenStateDivergence.cosine),
    "their squares": Minimized(2.1, 0.9, 2.0, HiddenStateDivergence.mse, 0.03),
}
LAYERS = {1: 1, 2: 3}  # of the student and of the teacher, whose states are compared, counted from 1
TRIED_WEIGHT = 0.6  # of hidden states, for the gradient of the first step, in which the automatic one is 0
CHECKED = {"alone": ALONE, "dp2": LAYOUTS["dp2"], "tp2": LAYOUTS["tp2"], "cp2": Layout(cp=2)}


def objectives_in(layout: Layout) -> list[str]:
    """Hidden states in one process: `test_hidden_states.py` compares every layout with it."""
    return [name for name, spec in OBJECTIVES.items() if layout == ALONE or spec.hidden_states is None]


def objective_of(name: str, world: World, options: BuildOptions, *, hidden_weight: float | None = None):
    spec, groups = OBJECTIVES[name], options.groups
    head = HeadLoss(
        vocab_size=131, kl_weight=spec.kl_weight, cross_entropy_weight=spec.cross_entropy_weight,
        temperature=spec.temperature, chunk_tokens=7, group=groups.tp,
    )  # fmt: skip
    if name == "cross-entropy":
        return LanguageModelObjective(head)
    student, teacher = (open_nemo(world.nemo[role]) for role in ("student", "teacher"))
    hidden = None
    if spec.hidden_states is not None:
        section = HiddenStatesConfig(
            list(HiddenStateKind), spec.hidden_states, spec.hidden_weight, list(LAYERS), list(LAYERS.values())
        )
        config = SimpleNamespace(
            seed=SEED_OF_MAP, distill=SimpleNamespace(hidden_states=section), parallel=ParallelConfig()
        )
        hidden = hidden_states_of(config, student, teacher, head=head, groups=groups)
        hidden.weight = hidden.weight if hidden_weight is None else hidden_weight
    return DistillationObjective(head, Teacher(teacher.weights, options), hidden_states=hidden)


def train_all(groups, world: World, folder: Path) -> None:
    """Train under each objective by the library's own step: logs and the trained model, by name, under `folder`."""
    torch.set_num_threads(1)  # several would wait for each other longer than they compute
    training_step.build_datasets = datasets_with_holes
    overlap = groups.layout.dp > 1
    options = BuildOptions(
        groups=groups, overlap_grad_reduce=overlap, overlap_param_gather=overlap, ddp_bucket_size=BUCKET
    )
    for name in objectives_in(groups.layout):
        training_step.train_model(
            open_nemo(world.nemo["student"]), folder / f"{name}.nemo",
            objective=objective_of(name, world, options), options=options,
            blend=own_cache(world.blend, folder / "index"), training=TRAINING, run_dir=folder, origin=ORIGIN,
            log_every_n_steps=1,
        )  # fmt: skip


def differentiate_all(groups, world: World, folder: Path, samples: dict[str, Tensor]) -> None:
    """The gradient of the first global batch under each objective, saved as though it were a model."""
    torch.set_num_threads(1)
    options = BuildOptions(groups=groups)
    source = open_nemo(world.nemo["student"])
    share = len(samples["tokens"]) // groups.layout.dp
    mine = {name: x[groups.dp_rank * share :][:share] for name, x in samples.items()}
    batches = [{name: x[n : n + MICRO] for name, x in mine.items()} for n in range(0, share, MICRO)]
    for name in objectives_in(groups.layout):
        model = build_model(source.arch, options)
        load_weights(model, source.weights, groups)
        plain = dataclasses.replace(options, distributed_optimizer=False)
        state = TrainState.start(model, OPTIM, max_steps=TRAINING.max_steps, options=plain)
        state.zero_gradients()
        objective = objective_of(name, world, options, hidden_weight=TRIED_WEIGHT)
        batch_sums(state.model, batches, objective, groups=groups, train=True)
        for parameter in state.model.parameters():
            parameter.data.copy_(parameter.main_grad)
        save_model(folder / f"gradient of {name}.nemo", state.model, source.arch, groups, tokenizer=source.tokenizer,
                   tokens=0, origin=ORIGIN)  # fmt: skip


def learning_rate(step: int) -> float:
    """Linear warm-up, then a cosine that ends at the last step; steps are counted from 1."""
    if step <= OPTIM.warmup_steps:
        return OPTIM.lr * step / OPTIM.warmup_steps
    done = (step - OPTIM.warmup_steps) / (TRAINING.max_steps - OPTIM.warmup_steps)
    return OPTIM.min_lr + (OPTIM.lr - OPTIM.min_lr) * (1 + math.cos(math.pi * done)) / 2


class States:
    """What the layers of a transformers model give in its newest forward pass, by kind and number, [b, s, h]."""

    def __init__(self, model) -> None:
        self.heard: dict[tuple[str, int], Tensor] = {}
        self._listen(model.model.embed_tokens, "embeddings", 1)
        for number, layer in enumerate(model.model.layers, start=1):
            self._listen(layer.self_attn, "attention_outputs", number)
            self._listen(layer.mlp, "mlp_outputs", number)
            self._listen(layer, "layer_outputs", number)

    def _listen(self, module, kind: str, number: int) -> None:
        def hook(_, args, output) -> None:
            self.heard[kind, number] = output[0] if isinstance(output, tuple) else output

        module.register_forward_hook(hook)

    def normed(self, kind: str, number: int) -> Tensor:
        """[b * s, h], divided by the root of the mean square, as RMSNorm does."""
        x = self.heard[kind, number].flatten(0, 1)
        return x / (x.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt()


class Reference:
    """The same run in plain PyTorch: `records` as the log has them, `gradients` of step 1, `weights` at the end."""

    def __init__(self, name: str, world: World, train, valid) -> None:
        from transformers import AutoModelForCausalLM

        self.spec = OBJECTIVES[name]
        self.model, self.teacher = (
            AutoModelForCausalLM.from_pretrained(world.hf[role], dtype=torch.float32).train()
            for role in ("student", "teacher")
        )
        self.states = States(self.model), States(self.teacher)
        widths = [model.config.hidden_size for model in (self.model, self.teacher)]
        self.map = torch.nn.Parameter(StateMap(*widths, seed=SEED_OF_MAP, groups=Groups()).weight_GH.detach().clone())
        self.hidden_weight = self.spec.hidden_weight or 0.0
        self.train, self.valid = train, valid
        self.records: list[dict[str, float]] = []
        self.tokens = 0
        parameters = list(self.model.parameters())
        groups = [
            {"params": [p for p in parameters if p.dim() > 1], "weight_decay": OPTIM.weight_decay},
            {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},  # norms; Megatron's rule
            {"params": [self.map], "weight_decay": OPTIM.weight_decay},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=tuple(OPTIM.betas), eps=OPTIM.eps)
        self.gradients = self.first_gradients()
        for step in range(1, TRAINING.max_steps + 1):
            self.step(step)
            if step % TRAINING.val_check_interval == 0:
                self.validate(step)
        self.weights = {key: p.detach() for key, p in self.model.named_parameters()}

    def means(self, batch: dict[str, Tensor], *, hidden_weight: float) -> dict[str, Tensor]:
        """Means over the unmasked tokens of a batch, from whole logits and states."""
        spec, mask = self.spec, batch["loss_mask"].flatten()
        logits = self.model(batch["tokens"]).logits.flatten(0, 1)
        with torch.no_grad():
            wanted = self.teacher(batch["tokens"]).logits.flatten(0, 1)
        by_token = functional.cross_entropy(logits, batch["labels"].flatten(), reduction="none")
        log_p, log_q = (functional.log_softmax(x / spec.temperature, dim=-1) for x in (wanted, logits))
        divergence = (log_p.exp() * (log_p - log_q)).sum(dim=-1)
        cross_entropy, forward_kl = ((x * mask).sum() / mask.sum() for x in (by_token, divergence))
        loss = spec.kl_weight * spec.temperature**2 * forward_kl + spec.cross_entropy_weight * cross_entropy
        found = {"cross_entropy": cross_entropy, "forward_kl": forward_kl}
        if spec.hidden_states is not None:
            found |= self.hidden_means(mask)
            loss = loss + hidden_weight * sum(found[name] for name in found if name.endswith(spec.hidden_states.value))
            found["hidden_states_weight"] = torch.tensor(hidden_weight)
        return {"loss": loss, **found}

    def hidden_means(self, mask: Tensor) -> dict[str, Tensor]:
        """Of each kind the sum over its pairs."""
        found = {}
        for kind in ("embeddings", "attention_outputs", "mlp_outputs", "layer_outputs"):
            by_token = torch.zeros_like(mask)
            for ours, theirs in LAYERS.items() if kind != "embeddings" else [(1, 1)]:
                y = self.states[0].normed(kind, ours) @ self.map.T
                t = self.states[1].normed(kind, theirs).detach()
                if self.spec.hidden_states is HiddenStateDivergence.mse:
                    by_token = by_token + (y - t).square().mean(dim=-1)
                else:
                    by_token = by_token + 1 - (y * t).sum(dim=-1) / (y.norm(dim=-1) * t.norm(dim=-1))
            found[f"{kind}_{self.spec.hidden_states.value}"] = (by_token * mask).sum() / mask.sum()
        return found

    def first_gradients(self) -> dict[str, Tensor]:
        batch = rows(self.train, range(TRAINING.global_batch_size))
        self.means(batch, hidden_weight=TRIED_WEIGHT)["loss"].backward()
        return {key: p.grad.clone() for key, p in self.model.named_parameters()}

    def step(self, step: int) -> None:
        last, spec = step * TRAINING.global_batch_size, self.spec
        batch = rows(self.train, range(last - TRAINING.global_batch_size, last))
        self.optimizer.zero_grad()
        means = self.means(batch, hidden_weight=self.hidden_weight)
        means["loss"].backward()
        if spec.hidden_states is not None:  # by its own norm
            self.map.grad = torch.zeros_like(self.map) if self.map.grad is None else self.map.grad
            torch.nn.utils.clip_grad_norm_([self.map], OPTIM.gradient_clip_val)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), OPTIM.gradient_clip_val)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step)
        self.optimizer.step()
        if spec.hidden_states is not None and spec.hidden_weight is None:
            inside = sum(x.item() for name, x in means.items() if name.endswith(spec.hidden_states.value))
            self.hidden_weight = spec.kl_weight * spec.temperature**2 * means["forward_kl"].item() / inside
        self.tokens += int(batch["loss_mask"].sum())
        facts = {"learning_rate": learning_rate(step), "grad_norm": float(norm), "consumed_tokens": self.tokens}
        self.records.append({"step": step, **{key: x.item() for key, x in means.items()}, **facts})

    @torch.no_grad()
    def validate(self, step: int) -> None:
        means = self.means(rows(self.valid, range(VALIDATED)), hidden_weight=self.hidden_weight)
        self.records.append({"step": step, **{f"val_{key}": float(x) for key, x in means.items()}})


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def datasets(world, tmp_path_factory):
    """(training, validation) samples of the run, asked for by this process alone."""
    blend = own_cache(world.blend, tmp_path_factory.mktemp("index"))
    return datasets_with_holes(blend, num_train=TRAINING.max_steps * TRAINING.global_batch_size, num_valid=VALIDATED)


@pytest.fixture(scope="module")
def references(world, datasets):
    return {name: Reference(name, world, *datasets) for name in OBJECTIVES}


@pytest.mark.parametrize("layout", CHECKED)
def test_steps_are_those_of_plain_pytorch(layout, world, references, tmp_path):
    run_layout(train_all, CHECKED[layout], world, tmp_path)
    for name in objectives_in(CHECKED[layout]):
        reference = references[name]
        log = tmp_path / "logs" / name / "metrics.jsonl"
        records = [json.loads(line) for line in log.read_text().splitlines()]
        assert [record["step"] for record in records] == [record["step"] for record in reference.records]
        for ours, theirs in zip(records, reference.records, strict=True):
            wanted = {key: value for key, value in theirs.items() if key in ours}
            measured = {key.removeprefix("val_") for key in wanted}
            assert {"loss", "cross_entropy"} <= measured
            assert ("forward_kl" in measured) == (name != "cross-entropy")
            assert len([key for key in measured if key.endswith(("_cosine", "_mse", "states_weight"))]) == (
                0 if OBJECTIVES[name].hidden_states is None else 5
            )
            assert {key: ours[key] for key in wanted} == pytest.approx(wanted, rel=2e-5, abs=1e-7), name
        weights = as_hf(tmp_path / f"{name}.nemo", tmp_path / f"{name}_hf")
        assert weights.keys() == reference.weights.keys()
        assert open_nemo(tmp_path / f"{name}.nemo").manifest.tokens == reference.tokens, name
        # A cosine divides a gradient by the size of the state: what is rounded in small ones weighs more.
        nearly = 2e-5 if OBJECTIVES[name].hidden_states is None else 1e-4
        for key, weight in reference.weights.items():
            torch.testing.assert_close(weights[key], weight, rtol=0, atol=nearly,
                                       msg=lambda text, key=key, name=name: f"{name} {key}: {text}")  # fmt: skip


@pytest.mark.parametrize("layout", CHECKED)
def test_gradients_are_those_of_plain_pytorch(layout, world, datasets, references, tmp_path):
    """The mean over the tokens of the global batch, whatever rank and micro-batch they were in."""
    run_layout(differentiate_all, CHECKED[layout], world, tmp_path, rows(datasets[0], range(8)))
    for name in objectives_in(CHECKED[layout]):
        reference = references[name]
        gradients = as_hf(tmp_path / f"gradient of {name}.nemo", tmp_path / f"{name}_hf")
        for key, gradient in reference.gradients.items():
            scale = float(gradient.abs().max())
            assert scale > 1e-4, f"{key}: a gradient of nothing would prove nothing"
            torch.testing.assert_close(gradients[key], gradient, rtol=0, atol=1e-5 * scale,
                                       msg=lambda text, key=key, name=name: f"{name} {key}: {text}")  # fmt: skip


def test_the_comparison_would_notice_what_it_is_for(references, datasets):
    """Norms on both sides of the limit, and micro-batches of different numbers of tokens."""
    for name, reference in references.items():
        norms = [record["grad_norm"] for record in reference.records if "grad_norm" in record]
        assert min(norms) < OPTIM.gradient_clip_val < max(norms), f"{name}: {norms}"
    tokens = [int(rows(datasets[0], range(n, n + MICRO))["loss_mask"].sum()) for n in range(0, 8, MICRO)]
    assert max(tokens) > min(tokens) + 3, tokens


def train_until_poisoned(groups, world: World, folder: Path) -> None:
    first = (3 - 1) * TRAINING.global_batch_size
    training_step.build_datasets = partial(datasets_with_holes, poisoned=first)
    options = BuildOptions(groups=groups)
    training_step.train_model(
        open_nemo(world.nemo["student"]), folder / "trained.nemo", options=options, run_dir=folder, origin=ORIGIN,
        objective=objective_of("cross-entropy", world, options), blend=own_cache(world.blend, folder / "index"),
        training=dataclasses.replace(TRAINING, save_every_n_steps=2),
    )  # fmt: skip


def test_a_loss_that_is_not_finite_ends_the_run_before_its_step(world, tmp_path):
    with pytest.raises(UserError, match=r"step 3: the loss mask is not finite in 2 samples: sample 16 of text \(doc"):
        run_layout(train_until_poisoned, ALONE, world, tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints" / "trained").iterdir()] == ["step_00000002"]
    assert not (tmp_path / "trained.nemo").exists()
