"""Every part under interleaved pipelines and context parallelism: the same as in one process, to rounding.

One start of the ranks of a layout goes through all parts, and so does one process.
"""

import dataclasses
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from layouts import ORIGIN, assert_same_weights, load_model, random_models, share_of_batch, weights_of

from minitron_nemo.checkpoint.formats.nemo import open_nemo
from minitron_nemo.config.importance import EstimateImportanceConfig
from minitron_nemo.config.schema import OptimConfig
from minitron_nemo.data.calibration import CalibrationSet
from minitron_nemo.distillation.teacher import Teacher
from minitron_nemo.distributed.groups import Groups
from minitron_nemo.distributed.layout import Layout
from minitron_nemo.engine.model import BuildOptions, HeadlessGPT
from minitron_nemo.errors import UserError
from minitron_nemo.losses.lm_head import HeadLoss
from minitron_nemo.steps.estimate import Estimate, check_interleaved, estimate
from minitron_nemo.steps.stages import Stages
from minitron_nemo.testing import ALONE, LLAMA, MISTRAL, random_batch, run_layout
from minitron_nemo.training.checkpoints import CheckpointFolder, save_model
from minitron_nemo.training.objectives import DistillationObjective, batch_sums
from minitron_nemo.training.state import TrainState

GLOBAL_BATCH, WINDOW, SEQ_LENGTH, STEPS = 4, 2, 16, 3
SAMPLES = 16  # of the calibration set: they are taken by eighths, each of whole groups of micro-batches
ARCHS = {
    "student": dataclasses.replace(MISTRAL, num_layers=5),
    "teacher": dataclasses.replace(LLAMA, num_layers=6, hidden_size=64),
}
# The layers of each chunk in the order of the forward pass, by the number of chunks: uneven, and split otherwise.
STAGES = {
    "student": {2: [2, 3], 4: [1, 2, 1, 1]},
    "teacher": {2: [4, 2], 4: [2, 1, 1, 2]},
}
WIDER = {
    "pp2_vpp2": Layout(pp=2, vpp=2),
    "cp2_dp2": Layout(cp=2, dp=2),
    "tp2_pp2_vpp2_cp2": Layout(tp=2, pp=2, vpp=2, cp=2, sequence_parallel=True),
}


@dataclass(frozen=True)
class Found:
    """What one layout gave: the sums of a step and of validation, gradient norms, and scores by criterion and axis."""

    sums: list[dict[str, float]]
    norms: list[float]
    resumed: list[float]  # those of the steps after the newest training checkpoint
    scores: dict[str, dict[str, torch.Tensor]]
    waiting: list[tuple[int, int]]  # of each rank the stage and the most layers that wait for their backward pass


def go_through_everything(groups: Groups, models: dict[str, Path], folder: Path) -> Found:
    """Distillation in windows with every overlap, then importance; `folder` gets gradients and trained weights."""
    student, teacher = (open_nemo(models[role]) for role in ("student", "teacher"))
    chunks = groups.layout.pp * groups.layout.vpp
    stages = {role: known.get(chunks) for role, known in STAGES.items()}
    head = HeadLoss(vocab_size=131, kl_weight=0.8, cross_entropy_weight=0.2, temperature=2.0, chunk_tokens=5,
                    group=groups.tp)  # fmt: skip
    beside = Teacher(teacher.weights, BuildOptions(groups=groups, stage_layers=stages["teacher"]))
    objective = DistillationObjective(head, beside, window=WINDOW)
    batches = [share_of_batch(student.arch, step=n, size=GLOBAL_BATCH, seq_length=SEQ_LENGTH, groups=groups)
               for n in range(STEPS)]  # fmt: skip

    def start(**options) -> TrainState:
        model = load_model(models["student"], groups, stage_layers=stages["student"])
        return TrainState.start(
            model, OptimConfig(lr=2e-3, min_lr=2e-3), max_steps=STEPS, options=BuildOptions(groups=groups, **options)
        )

    def save(state: TrainState, name: str) -> None:
        save_model(folder / f"{name}.nemo", state.model, student.arch, groups, tokenizer=folder, tokens=0,
                   origin=ORIGIN)  # fmt: skip

    # Documents of the first step are kept apart: one ends inside of a chunk, one at the end of a rank's first.
    documents = torch.tensor([0] * 4 + [1] * 5 + [2] * 7)[None]
    batches[0] = [{**batch, "documents": documents} for batch in batches[0]]
    state = start(distributed_optimizer=False)
    state.zero_gradients()
    with _counting_layers(state.model.gpts()) as waiting:
        sums = [batch_sums(state.model, batches[0], objective, groups=groups, train=True)]
    with torch.no_grad():
        sums.append(batch_sums(state.model, batches[0], objective, groups=groups, train=False))
        for parameter in state.model.parameters():
            parameter.copy_(parameter.main_grad)
    save(state, "gradient")

    overlaps = dict(overlap_grad_reduce=True, overlap_param_gather=True, ddp_bucket_size=3000)
    kept = CheckpointFolder(folder / "checkpoints", "same", student.arch, groups, layout="same")

    def train(state: TrainState) -> list[float]:
        norms = []
        for some in batches[state.position.step :]:
            state.zero_gradients()
            batch_sums(state.model, some, objective, groups=groups, train=True)
            norms.append(state.step())
            state.position.advance(samples=GLOBAL_BATCH, tokens=0)
            if state.position.step < STEPS:
                kept.save(state)
        return norms

    state = start(**overlaps)
    norms = train(state)
    save(state, "trained")
    state = start(**overlaps)
    kept.resume(state)
    resumed = train(state)
    save(state, "resumed")
    scores = _scores(groups, models, stages["student"])
    return Found(sums, norms, resumed, scores, groups.share_json([groups.pp_rank, max(waiting)]))


@contextmanager
def _counting_layers(chunks: list[HeadlessGPT]) -> Iterator[list[int]]:
    """A list of how many layers of this rank wait for their backward pass, at every change."""
    waiting = [0]
    with ExitStack() as hooks:
        for chunk in chunks:
            layers = len(chunk.decoder.layers)

            def hook(_, args, output, layers=layers):
                waiting.append(waiting[-1] + layers)
                output.register_hook(lambda gradient: waiting.append(waiting[-1] - layers))

            hooks.callback(chunk.register_forward_hook(hook).remove)
        yield waiting
    assert waiting[-1] == 0


def _scores(groups: Groups, models: dict[str, Path], stages: list[int] | None) -> dict[str, dict[str, torch.Tensor]]:
    """By activations and by gradients."""
    student = open_nemo(models["student"])
    data = random_batch(student.arch, samples=SAMPLES, seq_length=SEQ_LENGTH, seed=7)
    calibration = CalibrationSet(data["tokens"], "random", data["labels"], data["loss_mask"])
    options = BuildOptions(groups=groups, stage_layers=stages)
    by_gradients = dict.fromkeys(("hidden_size", "ffn_hidden_size", "num_attention_heads", "num_layers"), "taylor")
    found = {}
    for name, criteria, sequence in (("activations", None, "variance"), ("gradients", by_gradients, "mean")):
        how = Estimate(criteria, sequence, second_moments=criteria is None)
        estimated = estimate(student.weights, calibration, how, options=options)
        found[name] = {axis: scores.numpy() for axis, scores in estimated.scores.by_axis.items()}
        if estimated.second_moments is not None:
            found["second moments"] = {key: x.numpy() for key, x in estimated.second_moments(torch.float64)}
    return found


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return random_models(tmp_path_factory.mktemp("models"), ARCHS)


@pytest.fixture(scope="module")
def alone(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    return run_layout(go_through_everything, ALONE, models, folder), folder


@pytest.mark.parametrize("layout", WIDER)
def test_every_part_is_what_one_process_makes(layout, models, alone, tmp_path):
    found = run_layout(go_through_everything, WIDER[layout], models, tmp_path)
    wanted, folder = alone
    for ours, theirs in zip(found.sums, wanted.sums, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6)
    known = Stages.of(ARCHS["student"], WIDER[layout], STAGES["student"].get(WIDER[layout].pp * WIDER[layout].vpp))
    for stage, layers in found.waiting:
        assert layers == known.waiting_layers(stage, min(WINDOW, GLOBAL_BATCH // WIDER[layout].dp)), "the dry run's"
    assert found.norms == pytest.approx(wanted.norms, rel=1e-5)
    ours, theirs = (weights_of(path / "gradient.nemo") for path in (tmp_path, folder))
    for key, gradient in theirs.items():
        scale = float(gradient.abs().max())
        assert scale > 0, f"{key}: a gradient of nothing would prove nothing"
        assert float((ours[key] - gradient).abs().max()) <= 1e-5 * scale, key
    ours, theirs = (weights_of(path / "trained.nemo") for path in (tmp_path, folder))
    for key, weight in theirs.items():
        assert float((ours[key] - weight).abs().max()) <= 2e-4, key
    assert found.resumed == found.norms[2:], "a resumed run is the same to the bit"
    assert_same_weights(*(open_nemo(tmp_path / f"{name}.nemo") for name in ("resumed", "trained")))
    for criterion, by_axis in wanted.scores.items():
        for axis, scores in by_axis.items():
            mine = found.scores[criterion][axis]
            assert abs(mine - scores).max() <= 2e-5 * abs(scores).max() + 1e-6, f"{criterion} {axis}"


def test_an_interleaved_pipeline_is_asked_of_the_samples_between_two_saves():
    section, layout = EstimateImportanceConfig(num_samples=64, save_every_n_samples=8), Layout(pp=2, vpp=2, dp=2)
    check_interleaved(section, layout)
    for changed in ({"micro_batch_size": 4}, {"save_every_n_samples": 6}, {"first_sample": 1}, {"num_samples": 66}):
        with pytest.raises(UserError, match=r"a data-parallel rank has \d+; the interleaved pipeline needs"):
            check_interleaved(dataclasses.replace(section, **changed), layout)
