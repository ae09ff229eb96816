"""The loss on hidden states under every layout: sums, gradients, map and weight are those of one process.

One start of the ranks of a layout goes through everything, and so does one process.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from layouts import ORIGIN, assert_same_weights, random_models, share_of_batch, weights_of

from minitron_nemo.checkpoint.formats.nemo import open_nemo
from minitron_nemo.config.hidden_states import HiddenStateDivergence, HiddenStateKind, HiddenStatesConfig
from minitron_nemo.config.parallel import Recompute
from minitron_nemo.config.schema import OptimConfig
from minitron_nemo.distillation.teacher import Teacher
from minitron_nemo.distributed.groups import Groups
from minitron_nemo.distributed.layout import Layout
from minitron_nemo.engine.model import BuildOptions, build_model
from minitron_nemo.engine.weights import load_weights
from minitron_nemo.losses.lm_head import HeadLoss
from minitron_nemo.steps.hidden_states import hidden_states_of
from minitron_nemo.testing import ALONE, LLAMA, MISTRAL, run_layout
from minitron_nemo.training.checkpoints import BESIDE, CheckpointFolder, save_model
from minitron_nemo.training.objectives import DistillationObjective, batch_sums
from minitron_nemo.training.state import TrainState

GLOBAL_BATCH, WINDOW, SEQ_LENGTH, STEPS, TRIED_WEIGHT = 4, 2, 16, 2, 0.6
# So large an epsilon that Adam's steps still know how large the gradient was.
OPTIM = OptimConfig(lr=2e-2, min_lr=1e-2, warmup_steps=1, eps=0.1, gradient_clip_val=0.0)
ARCHS = {
    "narrow": dataclasses.replace(MISTRAL, num_layers=5),
    "wide": dataclasses.replace(LLAMA, num_layers=5, hidden_size=64),
    "teacher": dataclasses.replace(LLAMA, num_layers=10, hidden_size=64),
}
# The layers of each chunk in the order of the forward pass, by the number of chunks: uneven, and split otherwise, so
# that states cross between the stages both ways.
STAGES = {
    "student": {2: [2, 3], 4: [1, 2, 1, 1]},
    "teacher": {2: [7, 3], 4: [2, 1, 4, 3]},
}
CASES = {  # the student and its settings: a map and the automatic weight, or neither
    "mapped": ("narrow", HiddenStatesConfig(
        kinds=list(HiddenStateKind), student_layers=[1, 2, 3, 5], teacher_layers=[1, 9, 4, 10],
    )),
    "as wide": ("wide", HiddenStatesConfig(
        kinds=[HiddenStateKind.mlp_outputs, HiddenStateKind.layer_outputs], divergence=HiddenStateDivergence.mse,
        weight=0.7, student_layers=[1, 3, 4], teacher_layers=[8, 8, 2],
    )),
}  # fmt: skip
LAYOUTS = {
    "tp2": Layout(tp=2),
    "pp2_vpp2": Layout(pp=2, vpp=2),
    "cp2_dp2": Layout(cp=2, dp=2),
    "tp2_sp_pp2": Layout(tp=2, pp=2, sequence_parallel=True),
}
RECOMPUTED = {
    "layers": Recompute("full", "uniform", 1),
    "some layers": Recompute("full", "block", 1),
    "mlp": Recompute("selective", modules=("core_attn", "mlp")),
}


@dataclass(frozen=True)
class Trained:
    """What training gave: after each step the weight of the hidden states and the norm of the gradient; and the map."""

    weights: list[float]
    norms: list[float]
    map_GH: np.ndarray


@dataclass(frozen=True)
class Found:
    """What one case gave: sums of a step and of validation; with a map, training, and training from a checkpoint."""

    sums: list[dict[str, float]]
    recomputed: dict[str, bool]  # the same sums to the bit, and gradients but for the order of their additions
    trained: Trained | None = None
    resumed: Trained | None = None


class Run:
    """One case on this rank."""

    def __init__(self, groups: Groups, case: str, models: dict[str, Path], folder: Path) -> None:
        role, section = CASES[case]
        self.groups, self.folder, self.case = groups, folder, case
        self.student, teacher = open_nemo(models[role]), open_nemo(models["teacher"])
        chunks = groups.layout.pp * groups.layout.vpp
        self.stages = {role: known.get(chunks) for role, known in STAGES.items()}
        self.config = SimpleNamespace(
            seed=7, distill=SimpleNamespace(hidden_states=section),
            parallel=SimpleNamespace(**{f"{role}_stage_layers": known for role, known in self.stages.items()}),
        )  # fmt: skip
        self.nemo_of_teacher = teacher
        self.teacher = Teacher(teacher.weights, BuildOptions(groups=groups, stage_layers=self.stages["teacher"]))

    def start(self, **options) -> tuple[TrainState, DistillationObjective]:
        head = HeadLoss(vocab_size=131, kl_weight=0.8, cross_entropy_weight=0.2, temperature=2.0, chunk_tokens=5,
                        group=self.groups.tp)  # fmt: skip
        hidden = hidden_states_of(self.config, self.student, self.nemo_of_teacher, head=head, groups=self.groups)
        build = BuildOptions(groups=self.groups, stage_layers=self.stages["student"], **options)
        model = build_model(self.student.arch, build)
        load_weights(model, self.student.weights, self.groups)
        state = TrainState.start(model, OPTIM, max_steps=STEPS, options=build, beside=hidden)
        return state, DistillationObjective(head, self.teacher, window=WINDOW, hidden_states=hidden)

    def batches(self, step: int) -> list[dict]:
        return share_of_batch(
            self.student.arch, step=step, size=GLOBAL_BATCH, seq_length=SEQ_LENGTH, groups=self.groups
        )

    def save(self, state: TrainState, name: str) -> None:
        save_model(self.folder / f"{self.case} {name}.nemo", state.model, self.student.arch, self.groups,
                   tokenizer=self.folder, tokens=0, origin=ORIGIN)  # fmt: skip

    def differentiated(self, *, saved: bool = False, **options) -> tuple[list[dict[str, float]], list[torch.Tensor]]:
        """The sums of a step and of validation, and every gradient of this rank."""
        state, objective = self.start(distributed_optimizer=False, **options)
        objective.hidden_states.weight = TRIED_WEIGHT
        state.zero_gradients()
        sums = [batch_sums(state.model, self.batches(0), objective, groups=self.groups, train=True)]
        gradients = [parameter.main_grad.clone() for parameter in state.model.parameters()]
        if (state_map := objective.hidden_states.map) is not None and state_map.weight_GH.grad is not None:
            gradients.append(state_map.weight_GH.grad.clone())
        with torch.no_grad():
            sums.append(batch_sums(state.model, self.batches(0), objective, groups=self.groups, train=False))
            for parameter in state.model.parameters():
                parameter.copy_(parameter.main_grad)
        if saved:
            self.save(state, "gradient")
        return sums, gradients

    def trained(self, name: str) -> Trained:
        """The steps from the newest checkpoint on; the model goes to `name`."""
        state, objective = self.start(overlap_grad_reduce=True, overlap_param_gather=True, ddp_bucket_size=3000)
        hidden = objective.hidden_states
        kept = CheckpointFolder(self.folder / "checkpoints", "same", self.student.arch, self.groups, layout="same")
        kept.resume(state)
        weights, norms = [], []
        while state.position.step < STEPS:
            state.zero_gradients()
            batch_sums(state.model, self.batches(state.position.step), objective, groups=self.groups, train=True)
            norms.append(state.step())
            weights.append(hidden.weight)
            state.position.advance(samples=GLOBAL_BATCH, tokens=0)
            if state.position.step < STEPS:
                kept.save(state)
        self.save(state, name)
        map_GH = hidden.map.weight_GH.detach()
        assert len(set(self.groups.share_json(map_GH.double().sum().item()))) == 1, "the same on all ranks"
        return Trained(weights, norms, map_GH.numpy())

    def go(self) -> Found:
        sums, gradients = self.differentiated(saved=True)
        if self.case != "mapped":
            return Found(sums, {})
        recomputed, layout = {}, self.groups.layout
        for name, recompute in RECOMPUTED.items() if layout == ALONE or layout.vpp > 1 else ():
            again, theirs = self.differentiated(recompute=recompute)
            pairs = zip(gradients, theirs, strict=True)
            same = all(float((a - b).abs().max()) <= 1e-6 * float(a.abs().max()) for a, b in pairs)
            recomputed[name] = all(self.groups.share_json(same and again == sums))
        return Found(sums, recomputed, self.trained("trained"), self.trained("resumed"))


def go_through_everything(groups: Groups, models: dict[str, Path], folder: Path) -> dict[str, Found]:
    torch.set_num_threads(1)  # several would wait for each other longer than they compute
    return {case: Run(groups, case, models, folder).go() for case in CASES}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return random_models(tmp_path_factory.mktemp("models"), ARCHS)


@pytest.fixture(scope="module")
def alone(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    return run_layout(go_through_everything, ALONE, models, folder), folder


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_stage_learns_from_the_teacher_what_one_process_does(layout, models, alone, tmp_path):
    found = run_layout(go_through_everything, LAYOUTS[layout], models, tmp_path)
    for case, wanted in alone[0].items():
        check_same(found[case], wanted, case, tmp_path, alone[1])
        assert all(found[case].recomputed.values()), found[case].recomputed
    check_trained(found["mapped"], alone[0]["mapped"], tmp_path, alone[1])
    check_resumed(found["mapped"], tmp_path)


def check_same(found: Found, wanted: Found, case: str, folder: Path, folder_alone: Path) -> None:
    for ours, theirs in zip(found.sums, wanted.sums, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6), case
    ours, theirs = (weights_of(path / f"{case} gradient.nemo") for path in (folder, folder_alone))
    for key, gradient in theirs.items():
        scale = float(gradient.abs().max())
        assert scale > 0, f"{key}: a gradient of nothing would prove nothing"
        assert float((ours[key] - gradient).abs().max()) <= 1e-5 * scale, f"{case}: {key}"


def check_trained(found: Found, wanted: Found, folder: Path, folder_alone: Path) -> None:
    assert found.trained.weights == pytest.approx(wanted.trained.weights, rel=1e-5)
    assert found.trained.norms == pytest.approx(wanted.trained.norms, rel=1e-5)
    assert abs(found.trained.map_GH - wanted.trained.map_GH).max() <= 1e-6
    ours, theirs = (weights_of(path / "mapped trained.nemo") for path in (folder, folder_alone))
    for key, weight in theirs.items():
        assert float((ours[key] - weight).abs().max()) <= 2e-5, key


def check_resumed(found: Found, folder: Path) -> None:
    """To the bit, with the map and the weight; and the student has nothing of the map."""
    assert found.resumed.weights == found.trained.weights[1:]
    assert found.resumed.norms == found.trained.norms[1:]
    assert np.array_equal(found.trained.map_GH, found.resumed.map_GH)
    assert_same_weights(*(open_nemo(folder / f"mapped {name}.nemo") for name in ("resumed", "trained")))
    assert (folder / "checkpoints" / "step_00000001" / BESIDE).is_file()
    assert not list((folder / "mapped trained.nemo").rglob(BESIDE))


def test_one_process_recomputes_and_resumes_as_though_it_had_not(alone):
    mapped = alone[0]["mapped"]
    assert mapped.recomputed == dict.fromkeys(RECOMPUTED, True)
    assert set(mapped.sums[0]) > {f"{kind.value}_cosine" for kind in HiddenStateKind}
    assert mapped.sums[0]["hidden_states_weight"] == TRIED_WEIGHT * mapped.sums[0]["tokens"]
    check_resumed(mapped, alone[1])


def test_sums_are_of_the_loss_that_is_minimized(alone):
    for case, found in alone[0].items():
        for sums in found.sums:
            inside = sum(value for name, value in sums.items() if name.endswith(("_cosine", "_mse")))
            heads = 0.8 * 4 * sums["forward_kl"] + 0.2 * sums["cross_entropy"]
            assert sums["loss"] == pytest.approx(heads + TRIED_WEIGHT * inside, rel=1e-12), case
        assert found.sums[0] == found.sums[1], "validation measures what training does"
