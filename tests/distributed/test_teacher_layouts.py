"""A teacher whose layout is its own gives what one process gives, with the bytes that are said.

One start of four ranks, and one of eight, goes through all cases, and so does one process.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from counted_traffic import Counting
from layouts import ORIGIN, random_models, share_of_batch

from minitron_nemo.checkpoint.formats.nemo import open_nemo
from minitron_nemo.checkpoint.geometry import Box
from minitron_nemo.checkpoint.source import TensorSource
from minitron_nemo.config.schema import Config, OptimConfig
from minitron_nemo.config.teacher import TeacherParallelConfig
from minitron_nemo.distillation.teacher import Teacher
from minitron_nemo.distributed.groups import Groups
from minitron_nemo.distributed.launch import run_on_ranks
from minitron_nemo.distributed.layout import Layout, Place
from minitron_nemo.distributed.ranks import Rank
from minitron_nemo.distributed.routes import routes
from minitron_nemo.engine.attention import own_positions
from minitron_nemo.engine.groups import form_groups
from minitron_nemo.engine.model import BuildOptions, build_model
from minitron_nemo.engine.weights import load_weights, local_pieces
from minitron_nemo.losses.lm_head import HeadLoss
from minitron_nemo.shape.taps import Pair, Tap
from minitron_nemo.steps.stages import Stages
from minitron_nemo.steps.teacher_memory import teacher_weights
from minitron_nemo.steps.traffic import Step
from minitron_nemo.testing import ALONE, LLAMA, MISTRAL, run_layout
from minitron_nemo.training.checkpoints import save_model
from minitron_nemo.training.objectives import DistillationObjective, batch_sums
from minitron_nemo.training.state import TrainState

GLOBAL_BATCH, SEQ_LENGTH = 6, 16
ARCHS = {
    "student": dataclasses.replace(LLAMA, num_layers=4),
    "teacher": dataclasses.replace(LLAMA, num_layers=5, hidden_size=64),
    "tied": dataclasses.replace(MISTRAL, num_layers=4),
}
STAGES = {2: [3, 2]}  # of the teacher, uneven


@dataclass(frozen=True)
class Case:
    """A student's layout, and how its teacher differs."""

    layout: Layout
    how: TeacherParallelConfig
    teacher: str = "teacher"
    window: int = 0


def how(tp: int | None = None, **settings) -> TeacherParallelConfig:
    return TeacherParallelConfig(tensor_model_parallel_size=tp, **settings)


SHARED, HOST = dict(shard_weights=True), dict(cpu_offloading_weights=True)
CASES = {
    "tp1 beside tp2 x dp2, an odd number of micro-batches": Case(Layout(tp=2, dp=2), how(1)),
    "tp2 beside cp2 x dp2, tied": Case(Layout(cp=2, dp=2), how(2), "tied"),
    "tp1 beside tp2 x cp2 in sequence parallel, shared out": Case(
        Layout(tp=2, cp=2, sequence_parallel=True), how(1, **SHARED)
    ),
    "tp1 beside tp2 x pp2 interleaved, shared out in host memory": Case(
        Layout(tp=2, pp=2, vpp=2), how(1, **SHARED, **HOST), "tied"
    ),
    "tp2 x dp2, in host memory": Case(Layout(tp=2, dp=2), how(**HOST, prefetch_layers=2)),
    "pp2 x dp2 in windows, tied, shared out": Case(Layout(pp=2, dp=2), how(**SHARED), "tied", window=2),
    "tp4 beside tp2 x pp2 x dp2 in sequence parallel and in windows": Case(
        Layout(tp=2, pp=2, dp=2, sequence_parallel=True), how(4), window=2
    ),
}


Sources = dict[str, TensorSource]  # opened once: that takes longer than a step of these sizes


def build(groups: Groups, sources: Sources, case: Case) -> Teacher:
    split = STAGES.get(groups.layout.pp) if case.teacher == "teacher" else None
    return Teacher(sources[case.teacher], BuildOptions(groups=groups, stage_layers=split), case.how)


def step_of(groups: Groups, sources: Sources, case: Case, teacher: Teacher, batches) -> tuple:
    """(state with the gradients of a distillation step, its sums)."""
    options = BuildOptions(groups=groups, distributed_optimizer=False)
    model = build_model(ARCHS["student"], options)
    load_weights(model, sources["student"], groups)
    state = TrainState.start(model, OptimConfig(), max_steps=2, options=options)
    head = HeadLoss(vocab_size=131, kl_weight=0.8, cross_entropy_weight=0.2, temperature=2.0,
                    group=groups.tp)  # fmt: skip
    objective = DistillationObjective(head, teacher, window=case.window)
    state.zero_gradients()
    sums = batch_sums(state.model, batches, objective, groups=groups, train=True)
    for parameter in state.model.parameters():
        parameter.data.copy_(parameter.main_grad)
    return state, sums


def batches_of(groups: Groups) -> list[dict[str, torch.Tensor]]:
    """Documents of two kinds are kept apart, in other places in every sample."""
    batches = share_of_batch(ARCHS["student"], step=0, size=GLOBAL_BATCH, seq_length=SEQ_LENGTH, groups=groups)
    places = torch.arange(SEQ_LENGTH)[None]
    return [{**batch, "documents": (places > int(batch["tokens"].sum()) % SEQ_LENGTH).long()} for batch in batches]


def in_one_process(groups: Groups, models: dict[str, Path], folder: Path) -> dict[str, tuple]:
    """For each teacher (its states [samples, s, h], the sums of a step); gradients in `folder`."""
    found, sources = {}, {name: open_nemo(path).weights for name, path in models.items()}
    for name in ("teacher", "tied"):
        case = Case(ALONE, how(), name)
        teacher, batches = build(groups, sources, case), batches_of(groups)
        states = torch.cat([said.final.transpose(0, 1) for said in teacher.outputs(batches)])
        state, sums = step_of(groups, sources, case, teacher, batches)
        save_model(folder / f"{name}.nemo", state.model, ARCHS["student"], groups, tokenizer=folder, tokens=0,
                   origin=ORIGIN)  # fmt: skip
        found[name] = (states.numpy(), sums)
    return found


def in_every_case(rank: Rank, models: dict[str, Path], wanted: dict[str, tuple], folder: Path) -> dict[str, list[dict]]:
    """For each case of as many ranks what every one of them found."""
    found, sources = {}, {name: open_nemo(path).weights for name, path in models.items()}
    gradients = {name: open_nemo(folder / f"{name}.nemo").weights for name in wanted}
    for name, case in CASES.items():
        if case.layout.world_size != rank.world_size:
            continue
        groups = form_groups(rank, case.layout)
        place = groups.layout.place(groups.rank)
        assert place == Place(groups.tp_rank, groups.cp_rank, groups.dp_rank, groups.pp_rank), "Megatron's order"
        ours = in_case(groups, sources, case, wanted[case.teacher][0], gradients[case.teacher])
        found[name] = groups.share_json(ours)
    return found


def in_case(groups: Groups, sources: Sources, case: Case, wanted: np.ndarray, gradients: TensorSource) -> dict:
    teacher, batches = build(groups, sources, case), batches_of(groups)
    held = bytes_held(teacher)
    with counted(groups, teacher) as counting:
        states = [output.final for output in teacher.outputs(batches)]
    state, sums = step_of(groups, sources, case, teacher, batches)
    return {
        "states": worst_state(groups, states, wanted),
        "same bits": not case.how.on_demand or same_bits(groups, sources, case, batches, teacher),
        "gradients": worst_gradient(groups, state.model, gradients),
        "sums": sums,
        "held": held,
        "stage": groups.pp_rank,
        "traffic": sorted((*key, size) for key, size in counting.bytes.items()),
        "said": sorted((*key, size) for key, size in said(groups, case, counting).items()),
        "trains nothing": not any(parameter.requires_grad for parameter in teacher.model.parameters()),
    }


def same_bits(groups: Groups, sources: Sources, case: Case, batches, teacher: Teacher) -> bool:
    """Whether states are what they are with every weight on its device, those inside of the teacher too."""
    plain = build(groups, sources, dataclasses.replace(case, how=how(case.how.tensor_model_parallel_size)))
    ways, split = (), groups.layout.stages(ARCHS[case.teacher].num_layers)
    if case.how.tensor_model_parallel_size is None:
        taps = [Tap("embeddings"), Tap("attention_outputs", 1), Tap("layer_outputs", 1), Tap("mlp_outputs", 2)]
        student = (
            [1, sum(split) - 1] if groups.layout.pp > 1 else split
        )  # the second layer's states go to another stage
        ways = routes([Pair(tap, tap) for tap in taps], student=student, teacher=split, stages=groups.layout.pp)
    ours, theirs = (list(model.outputs(batches, ways)) for model in (teacher, plain))
    pairs = [(a.final, b.final) for a, b in zip(ours, theirs, strict=True)]
    pairs += [(a.taps[tap], b.taps[tap]) for a, b in zip(ours, theirs, strict=True) for tap in b.taps]
    return all(a is b is None or torch.equal(a, b) for a, b in pairs)


def worst_state(groups: Groups, states, wanted: np.ndarray) -> float:
    """The largest error of this rank's part of its samples, relative to the largest state."""
    if not groups.is_last_stage:
        assert states == [None] * len(states)
        return 0.0
    share = GLOBAL_BATCH // groups.layout.dp
    theirs = torch.from_numpy(wanted)[groups.dp_rank * share : (groups.dp_rank + 1) * share]
    if groups.cp is not None:
        theirs = theirs[:, own_positions(SEQ_LENGTH, groups.cp)]
    ours = torch.cat([state.transpose(0, 1) for state in states])
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max() / theirs.abs().max())


def worst_gradient(groups: Groups, model, wanted: TensorSource) -> float:
    """The largest error of this rank's part of a gradient, relative to the largest of that tensor."""
    worst = 0.0
    for piece in local_pieces(model, ARCHS["student"], groups):
        whole = wanted.read(piece.logical.name)
        rows = min(piece.local.shape[0], whole.shape[0] - piece.offset[0])
        theirs = whole[Box(piece.offset, (rows, *piece.local.shape[1:])).slices()]
        worst = max(worst, float((piece.local[:rows] - theirs).abs().max() / whole.abs().max()))
    return worst


def bytes_held(teacher: Teacher) -> int:
    """Of all memory that the teacher's weights have on this rank."""
    tensors = [parameter.data for parameter in teacher.model.parameters()]
    tensors += [] if teacher.on_demand is None else teacher.on_demand.held
    tensors += [teacher.head_weight()] if teacher.groups.is_last_stage else []
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def counted(groups: Groups, teacher: Teacher) -> Counting:
    own = teacher.own_groups
    names = {"tp": groups.tp, "pp": groups.pp, "cp": groups.cp, "teacher_tp": own.groups.tp}
    return Counting({**names, "exchange": own.exchange, "copies": own.groups.batch}, small=0)


def said(groups: Groups, case: Case, counting: Counting) -> dict:
    """What the hidden states of a step are said to send, under the names that are counted."""
    beside = case.how.beside(case.layout)
    split = STAGES.get(groups.layout.pp) if case.teacher == "teacher" else None
    stages = Stages.of(ARCHS[case.teacher], beside.teacher, split)
    step = Step(SEQ_LENGTH, GLOBAL_BATCH // groups.layout.dp, element_bytes=4)
    by_name: dict = {}
    traffic = step.of_teacher_beside(stages, groups.pp_rank, beside=beside, shard_weights=case.how.shard_weights)
    if groups.layout.vpp > 1:  # takes whole groups: here four micro-batches a copy in the place of three
        traffic = dataclasses.replace(step, microbatches=8).of_teacher_beside(
            stages, groups.pp_rank, beside=beside, shard_weights=case.how.shard_weights
        ) | {key: size for key, size in traffic.items() if key[0] == "exchange"}
    for (name, kind), size in traffic.items():
        key = counting.named(name), kind
        documents = 2 if name == "exchange" and beside.replicas > 1 else 1  # travel beside the tokens
        by_name[key] = by_name.get(key, 0) + size * documents
    return by_name


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return random_models(tmp_path_factory.mktemp("models"), ARCHS)


@pytest.fixture(scope="module")
def found(models, tmp_path_factory):
    """(what one process gave, what every rank gave in each case)."""
    folder = tmp_path_factory.mktemp("gradients")
    alone = run_layout(in_one_process, ALONE, models, folder)
    found = [run_on_ranks(in_every_case, models, alone, folder, num_ranks=ranks) for ranks in (4, 8)]
    return alone, found[0] | found[1]


@pytest.mark.parametrize("case", CASES)
def test_hidden_states_loss_and_gradients_are_those_of_one_process(case, found):
    alone, by_case = found
    for rank in by_case[case]:
        assert rank["states"] <= 1e-5
        assert rank["gradients"] <= 1e-5
        assert rank["sums"] == pytest.approx(alone[CASES[case].teacher][1], rel=1e-6)
        assert rank["same bits"], "as with every weight on the device"
        assert rank["trains nothing"]


@pytest.mark.parametrize("case", CASES)
def test_a_dry_run_knows_the_bytes_of_the_teacher_on_every_rank(case, found):
    config, layout = config_of(CASES[case]), CASES[case].layout
    for rank in found[1][case]:
        arch = ARCHS[CASES[case].teacher]
        weights = teacher_weights(config, arch, rank["stage"], item=4)
        assert rank["held"] == weights.device + weights.host
        assert (weights.host > 0) == CASES[case].how.cpu_offloading_weights
    assert layout == config.layout


@pytest.mark.parametrize("case", CASES)
def test_what_crosses_between_ranks_is_what_is_said(case, found):
    for rank in found[1][case]:
        traffic, said = ({(group, kind): size for group, kind, size in rank[name]} for name in ("traffic", "said"))
        assert traffic == pytest.approx(said, rel=0.01)


def config_of(case: Case) -> Config:
    config, layout = Config(name="teacher", run_dir="unused"), case.layout
    config.trainer.devices = layout.world_size
    config.parallel.tensor_model_parallel_size, config.parallel.pipeline_model_parallel_size = layout.tp, layout.pp
    config.parallel.context_parallel_size, config.parallel.virtual_pipeline_model_parallel_size = layout.cp, layout.vpp
    config.parallel.sequence_parallel = layout.sequence_parallel
    config.parallel.teacher_stage_layers = STAGES.get(layout.pp) if case.teacher == "teacher" else None
    config.distill.teacher_parallel = case.how
    return config
