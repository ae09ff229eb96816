"""Training is the same under every layout: losses, gradient norms, gradients and the weights that come out."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from layouts import ORIGIN, load_model, logits_of, share_of_batch, weights_of
from torch.nn import functional

from minitron_nemo.checkpoint.formats.nemo import open_nemo
from minitron_nemo.config.schema import OptimConfig
from minitron_nemo.distillation.teacher import Teacher
from minitron_nemo.distributed.groups import Groups
from minitron_nemo.distributed.layout import Layout
from minitron_nemo.engine.model import BuildOptions
from minitron_nemo.losses.lm_head import HeadLoss
from minitron_nemo.testing import ALONE, LAYOUTS, LLAMA, MISTRAL, NEMOTRON, random_batch, random_nemo, run_layout
from minitron_nemo.training.checkpoints import save_model
from minitron_nemo.training.objectives import DistillationObjective, LanguageModelObjective, batch_sums
from minitron_nemo.training.state import TrainState

STEPS, GLOBAL_BATCH, SEQ_LENGTH = 8, 2, 8
QWEN = {"add_qkv_bias": True, "qk_layernorm": True}  # both families' tensors in one model
# A student of three layers never divides over two stages; its teacher is deeper, wider and split the other way round.
ARCHS = {
    "llama": dataclasses.replace(LLAMA, num_layers=3),
    "tied": dataclasses.replace(MISTRAL, num_layers=3, **QWEN),
    "nemotron": dataclasses.replace(NEMOTRON, num_layers=3),
    "teacher": dataclasses.replace(LLAMA, num_layers=5, hidden_size=64),
}
STAGES = {"student": {2: [1, 2]}, "teacher": {2: [4, 1]}}


@dataclass(frozen=True)
class Run:
    """What is trained, on what, with which optimizer."""

    model: str
    teacher: str | None
    distributed: bool


TRAINED = {
    "language model, tied, plain optimizer": Run("tied", None, False),
    "distillation, distributed optimizer": Run("llama", "teacher", True),
}
DIFFERENTIATED = {
    "tied": Run("tied", None, False),
    "nemotron": Run("nemotron", None, False),
    "distillation": Run("llama", "teacher", False),
}


def start(groups: Groups, run: Run, models: dict[str, Path]):
    """(state, objective) of a run on this rank."""
    arch = open_nemo(models[run.model]).arch
    model = load_model(models[run.model], groups, stage_layers=STAGES["student"].get(groups.layout.pp))
    options = BuildOptions(groups=groups, distributed_optimizer=run.distributed)
    optim = OptimConfig(lr=2e-3, min_lr=2e-4, warmup_steps=2)
    state = TrainState.start(model, optim, max_steps=STEPS, options=options)
    if run.teacher is None:
        head = HeadLoss(
            vocab_size=arch.vocab_size, kl_weight=0.0, cross_entropy_weight=1.0, chunk_tokens=5, group=groups.tp
        )
        return state, LanguageModelObjective(head)
    head = HeadLoss(vocab_size=arch.vocab_size, kl_weight=0.8, cross_entropy_weight=0.2, temperature=2.0,
                    chunk_tokens=5, group=groups.tp)  # fmt: skip
    stages = STAGES["teacher"].get(groups.layout.pp)
    teacher = Teacher(open_nemo(models[run.teacher]).weights, BuildOptions(groups=groups, stage_layers=stages))
    return state, DistillationObjective(head, teacher)


def sums_of_step(groups: Groups, arch, state, objective, *, step: int) -> dict[str, float]:
    batches = share_of_batch(arch, step=step, size=GLOBAL_BATCH, seq_length=SEQ_LENGTH, groups=groups)
    state.zero_gradients()
    return batch_sums(state.model, batches, objective, groups=groups, train=True)


def train_all(groups: Groups, models: dict[str, Path], folder: Path) -> dict[str, list[dict[str, float]]]:
    """For each of TRAINED a row per step: the sums and the gradient norm; weights in folder."""
    rows: dict[str, list[dict[str, float]]] = {}
    for number, (name, run) in enumerate(TRAINED.items()):
        arch = open_nemo(models[run.model]).arch
        state, objective = start(groups, run, models)
        rows[name] = []
        for step in range(STEPS):
            sums = sums_of_step(groups, arch, state, objective, step=step)
            rows[name].append({**sums, "grad_norm": state.step()})
        save(groups, state, arch, folder / f"trained_{number}.nemo")
    return rows


def differentiate_all(groups: Groups, models: dict[str, Path], folder: Path) -> None:
    """The gradients of the first batch of each of DIFFERENTIATED, saved as though they were weights."""
    for name, run in DIFFERENTIATED.items():
        arch = open_nemo(models[run.model]).arch
        state, objective = start(groups, run, models)
        sums_of_step(groups, arch, state, objective, step=0)
        for parameter in state.model.parameters():
            parameter.data.copy_(parameter.main_grad)
        save(groups, state, arch, folder / f"{name}.nemo")


def sums_and_logits(groups: Groups, models: dict[str, Path], batch: dict[str, torch.Tensor]) -> tuple:
    """The sums of one micro-batch of several samples, and the logits of student and teacher for it."""
    state, objective = start(groups, Run("llama", "teacher", False), models)
    sums = batch_sums(state.model, [batch], objective, groups=groups, train=False)
    return sums, *logits_of(groups, [models["llama"], models["teacher"]], batch["tokens"])


def save(groups, state, arch, path) -> None:
    save_model(path, state.model, arch, groups, tokenizer=path.parent / "no_tokenizer", tokens=0, origin=ORIGIN)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {
        name: random_nemo(folder / f"{name}.nemo", arch, seed=n).path for n, (name, arch) in enumerate(ARCHS.items())
    }


def new_folder(path: Path) -> Path:
    (path / "no_tokenizer").mkdir(parents=True)
    return path


@dataclass(frozen=True)
class Done:
    """What the ranks of a layout did: the rows of training, the folder of trained models, that of gradients."""

    rows: dict[str, list[dict[str, float]]]
    trained: Path
    gradients: Path


def do_all(groups: Groups, models: dict[str, Path], trained: Path, gradients: Path) -> dict:
    differentiate_all(groups, models, gradients)
    return train_all(groups, models, trained)


def done_in(layout: Layout, models: dict[str, Path], factory: pytest.TempPathFactory) -> Done:
    folders = [new_folder(factory.mktemp(name)) for name in ("trained", "gradients")]
    return Done(run_layout(do_all, layout, models, *folders), *folders)


@pytest.fixture(scope="module")
def alone(models, tmp_path_factory):
    return done_in(ALONE, models, tmp_path_factory)


@pytest.fixture(scope="module", params=LAYOUTS)
def in_layout(request, models, tmp_path_factory):
    return done_in(LAYOUTS[request.param], models, tmp_path_factory)


def test_eight_steps_are_the_same_in_every_layout(in_layout, alone):
    for number, name in enumerate(TRAINED):
        for column, tolerance in (("tokens", 0.0), ("loss", 1e-5), ("cross_entropy", 1e-5), ("grad_norm", 1e-4)):
            ours, theirs = (torch.tensor([row[column] for row in done.rows[name]]) for done in (in_layout, alone))
            torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=min(tolerance, 1e-5))
        ours, theirs = (weights_of(done.trained / f"trained_{number}.nemo") for done in (in_layout, alone))
        for key, weight in theirs.items():
            torch.testing.assert_close(ours[key], weight, rtol=0, atol=2e-4, msg=lambda text, key=key: f"{key}: {text}")


def test_every_gradient_is_the_same_in_every_layout(in_layout, alone):
    for name in DIFFERENTIATED:
        ours, theirs = (weights_of(done.gradients / f"{name}.nemo") for done in (in_layout, alone))
        for key, gradient in theirs.items():
            assert gradient.abs().max() > 0, f"{key}: a gradient of nothing would prove nothing"
            scale = float(gradient.abs().max())
            torch.testing.assert_close(ours[key], gradient, rtol=0, atol=1e-5 * scale,
                                       msg=lambda text, key=key, name=name: f"{name} {key}: {text}")  # fmt: skip


@pytest.mark.parametrize("layout", ["alone", "tp2_sp"])
def test_each_token_is_compared_with_its_own_label_and_its_own_teacher(layout, models):
    """A micro-batch of several samples, where [sequence, batch] and [batch, sequence] are not the same order."""
    batch = random_batch(ARCHS["llama"], samples=3, seq_length=SEQ_LENGTH)
    sums, student, teacher = run_layout(sums_and_logits, {"alone": ALONE, **LAYOUTS}[layout], models, batch)
    student, teacher = (torch.from_numpy(logits).double().flatten(0, 1) for logits in (student, teacher))
    mask = batch["loss_mask"].double().flatten()
    log_p, log_q = (functional.log_softmax(logits / 2.0, dim=1) for logits in (teacher, student))
    wanted = {
        "tokens": mask.sum(),
        "forward_kl": mask @ (log_p.exp() * (log_p - log_q)).sum(dim=1),
        "cross_entropy": mask @ functional.cross_entropy(student, batch["labels"].flatten(), reduction="none"),
        "teacher_entropy": -mask @ (log_p.exp() * log_p).sum(dim=1),
        "top1_agreement": mask @ (student.argmax(dim=1) == teacher.argmax(dim=1)).double(),
    }
    wanted["loss"] = 0.8 * 2.0**2 * wanted["forward_kl"] + 0.2 * wanted["cross_entropy"]
    assert sums == pytest.approx({name: float(value) for name, value in wanted.items()}, rel=1e-5, abs=1e-6)


def test_training_moves_every_weight(models, alone):
    """Otherwise equal weights would say little."""
    for number, run in enumerate(TRAINED.values()):
        before, after = weights_of(models[run.model]), weights_of(alone.trained / f"trained_{number}.nemo")
        for key, weight in before.items():
            assert (after[key] - weight).abs().max() > 1e-3, key
