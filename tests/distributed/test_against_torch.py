"""Training against plain PyTorch: transformers' Llama of the same weights and torch.optim.AdamW, written out here.

Losses, gradients, gradient norms, learning rates, validation and the weights after some steps; alone and on two ranks.
"""

import dataclasses
import json
import math
from functools import partial
from pathlib import Path

import pytest
import torch
from anchor_world import World, as_hf, datasets_with_holes, make_world, own_cache, rows
from layouts import ORIGIN
from torch import Tensor
from torch.nn import functional

from minitron_nemo.checkpoint.formats.nemo import open_nemo
from minitron_nemo.config.schema import OptimConfig, TrainingConfig
from minitron_nemo.distillation.teacher import Teacher
from minitron_nemo.distributed.layout import Layout
from minitron_nemo.engine.model import BuildOptions, build_model
from minitron_nemo.engine.weights import load_weights
from minitron_nemo.errors import UserError
from minitron_nemo.losses.lm_head import HeadLoss
from minitron_nemo.steps import train as training_step
from minitron_nemo.testing import ALONE, LAYOUTS, run_layout
from minitron_nemo.training.checkpoints import save_model
from minitron_nemo.training.objectives import DistillationObjective, LanguageModelObjective, batch_sums
from minitron_nemo.training.state import TrainState

# So high a peak and so strong a decay that leaving anything out shows after six steps; the limit of the gradient's
# norm lies between the norms of the steps, as clipping all of them alike would cancel in Adam.
OPTIM = OptimConfig(
    lr=1e-2, min_lr=2e-3, warmup_steps=2, weight_decay=0.4, betas=[0.8, 0.95], eps=1e-5, gradient_clip_val=1.8
)
TRAINING = TrainingConfig(
    max_steps=6, global_batch_size=8, micro_batch_size=2, optim=OPTIM, val_check_interval=3, limit_val_batches=2,
    save_every_n_steps=0,
)  # fmt: skip
BUCKET = 3000  # parameters: several for a model, the head's its own
MICRO = TRAINING.micro_batch_size
VALIDATED = TRAINING.limit_val_batches * TRAINING.global_batch_size
# What is minimized: the weight of the divergence, that of the cross-entropy, and the temperature.
OBJECTIVES = {"cross-entropy": (0.0, 1.0, 1.0), "distillation": (2.1, 0.9, 2.0)}
CHECKED = {"alone": ALONE, "dp2": LAYOUTS["dp2"], "tp2": LAYOUTS["tp2"], "cp2": Layout(cp=2)}


def objective_of(name: str, world: World, options: BuildOptions):
    kl_weight, ce_weight, temperature = OBJECTIVES[name]
    head = HeadLoss(vocab_size=131, kl_weight=kl_weight, cross_entropy_weight=ce_weight, temperature=temperature,
                    chunk_tokens=7, group=options.groups.tp)  # fmt: skip
    if name == "cross-entropy":
        return LanguageModelObjective(head)
    return DistillationObjective(head, Teacher(open_nemo(world.nemo["teacher"]).weights, options))


def train_all(groups, world: World, folder: Path) -> None:
    """Train under each objective by the library's own step: logs and the trained model, by name, under `folder`."""
    training_step.build_datasets = datasets_with_holes
    overlap = groups.layout.dp > 1
    options = BuildOptions(
        groups=groups, overlap_grad_reduce=overlap, overlap_param_gather=overlap, ddp_bucket_size=BUCKET
    )
    for name in OBJECTIVES:
        training_step.train_model(
            open_nemo(world.nemo["student"]), folder / f"{name}.nemo",
            objective=objective_of(name, world, options), options=options,
            blend=own_cache(world.blend, folder / "index"), training=TRAINING, run_dir=folder, origin=ORIGIN,
            log_every_n_steps=1,
        )  # fmt: skip


def differentiate_all(groups, world: World, folder: Path, samples: dict[str, Tensor]) -> None:
    """The gradient of the first global batch under each objective, saved as though it were a model."""
    options = BuildOptions(groups=groups)
    source = open_nemo(world.nemo["student"])
    share = len(samples["tokens"]) // groups.layout.dp
    mine = {name: x[groups.dp_rank * share :][:share] for name, x in samples.items()}
    batches = [{name: x[n : n + MICRO] for name, x in mine.items()} for n in range(0, share, MICRO)]
    for name in OBJECTIVES:
        model = build_model(source.arch, options)
        load_weights(model, source.weights, groups)
        plain = dataclasses.replace(options, distributed_optimizer=False)
        state = TrainState.start(model, OPTIM, max_steps=TRAINING.max_steps, options=plain)
        state.zero_gradients()
        batch_sums(state.model, batches, objective_of(name, world, options), groups=groups, train=True)
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


def means_of(model, teacher, batch: dict[str, Tensor], weights: tuple[float, float, float]) -> dict[str, Tensor]:
    """Means over the unmasked tokens of a batch, from whole logits."""
    kl_weight, ce_weight, tau = weights
    mask = batch["loss_mask"].flatten()
    logits = model(batch["tokens"]).logits.flatten(0, 1)
    with torch.no_grad():
        wanted = teacher(batch["tokens"]).logits.flatten(0, 1)
    by_token = functional.cross_entropy(logits, batch["labels"].flatten(), reduction="none")
    log_p, log_q = (functional.log_softmax(x / tau, dim=-1) for x in (wanted, logits))
    divergence = (log_p.exp() * (log_p - log_q)).sum(dim=-1)
    cross_entropy, forward_kl = ((x * mask).sum() / mask.sum() for x in (by_token, divergence))
    loss = kl_weight * tau**2 * forward_kl + ce_weight * cross_entropy
    return {"loss": loss, "cross_entropy": cross_entropy, "forward_kl": forward_kl}


class Reference:
    """The same run in plain PyTorch: `records` as the log has them, `gradients` of step 1, `weights` at the end."""

    def __init__(self, name: str, world: World, train, valid) -> None:
        from transformers import AutoModelForCausalLM

        self.weights_of_loss = OBJECTIVES[name]
        self.model, self.teacher = (
            AutoModelForCausalLM.from_pretrained(world.hf[role], dtype=torch.float32).train()
            for role in ("student", "teacher")
        )
        self.train, self.valid = train, valid
        self.records: list[dict[str, float]] = []
        self.tokens = 0
        self.gradients: dict[str, Tensor] = {}
        parameters = list(self.model.parameters())
        groups = [
            {"params": [p for p in parameters if p.dim() > 1], "weight_decay": OPTIM.weight_decay},
            {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},  # norms; Megatron's rule
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=tuple(OPTIM.betas), eps=OPTIM.eps)
        for step in range(1, TRAINING.max_steps + 1):
            self.step(step)
            if step % TRAINING.val_check_interval == 0:
                self.validate(step)
        self.weights = {key: p.detach() for key, p in self.model.named_parameters()}

    def step(self, step: int) -> None:
        last = step * TRAINING.global_batch_size
        batch = rows(self.train, range(last - TRAINING.global_batch_size, last))
        self.optimizer.zero_grad()
        means = means_of(self.model, self.teacher, batch, self.weights_of_loss)
        means["loss"].backward()
        if step == 1:
            self.gradients = {key: p.grad.clone() for key, p in self.model.named_parameters()}
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), OPTIM.gradient_clip_val)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step)
        self.optimizer.step()
        self.tokens += int(batch["loss_mask"].sum())
        facts = {"learning_rate": learning_rate(step), "grad_norm": float(norm), "consumed_tokens": self.tokens}
        self.records.append({"step": step, **{key: x.item() for key, x in means.items()}, **facts})

    @torch.no_grad()
    def validate(self, step: int) -> None:
        means = means_of(self.model, self.teacher, rows(self.valid, range(VALIDATED)), self.weights_of_loss)
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
    for name, reference in references.items():
        log = tmp_path / "logs" / name / "metrics.jsonl"
        records = [json.loads(line) for line in log.read_text().splitlines()]
        assert [record["step"] for record in records] == [record["step"] for record in reference.records]
        for ours, theirs in zip(records, reference.records, strict=True):
            wanted = {key: value for key, value in theirs.items() if key in ours}
            assert {"loss", "cross_entropy"} <= {key.removeprefix("val_") for key in wanted}
            assert ("forward_kl" in {key.removeprefix("val_") for key in wanted}) == (name == "distillation")
            assert {key: ours[key] for key in wanted} == pytest.approx(wanted, rel=2e-5, abs=1e-7), name
        weights = as_hf(tmp_path / f"{name}.nemo", tmp_path / f"{name}_hf")
        assert weights.keys() == reference.weights.keys()
        assert open_nemo(tmp_path / f"{name}.nemo").manifest.tokens == reference.tokens, name
        for key, weight in reference.weights.items():
            torch.testing.assert_close(weights[key], weight, rtol=0, atol=2e-5,
                                       msg=lambda text, key=key, name=name: f"{name} {key}: {text}")  # fmt: skip


@pytest.mark.parametrize("layout", CHECKED)
def test_gradients_are_those_of_plain_pytorch(layout, world, datasets, references, tmp_path):
    """The mean over the tokens of the global batch, whatever rank and micro-batch they were in."""
    run_layout(differentiate_all, CHECKED[layout], world, tmp_path, rows(datasets[0], range(8)))
    for name, reference in references.items():
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
    with pytest.raises(UserError, match="step 3: .* not finite"):
        run_layout(train_until_poisoned, ALONE, world, tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints" / "trained").iterdir()] == ["step_00000002"]
    assert not (tmp_path / "trained.nemo").exists()
