"""The dry run's memory beside what training really allocates, on every stage."""

import dataclasses

import pytest
import torch
from layouts import load_model, samples

from minitron_nemo.checkpoint.formats.nemo import open_nemo
from minitron_nemo.config.hidden_states import HiddenStateKind
from minitron_nemo.config.parallel import Recompute
from minitron_nemo.config.schema import Accelerator, Config, OptimConfig, TrainingConfig
from minitron_nemo.distributed.groups import Groups
from minitron_nemo.distributed.layout import Layout
from minitron_nemo.engine.model import BuildOptions, build_model
from minitron_nemo.engine.weights import load_weights
from minitron_nemo.losses.lm_head import HeadLoss
from minitron_nemo.shape.arch import ModelArch
from minitron_nemo.steps.memory import CONTEXTS, TOLERANCE, kept_by_stage, stage_memory, training_memory
from minitron_nemo.steps.stages import Stages
from minitron_nemo.testing import ALONE, LLAMA, MISTRAL, NEMOTRON, random_nemo, run_layout
from minitron_nemo.training.objectives import LanguageModelObjective, batch_sums
from minitron_nemo.training.state import TrainState

SEQ, MICRO = 64, 2
MODELS = {name: dataclasses.replace(arch, num_layers=3) for name, arch in
          {"llama": LLAMA, "tied": dataclasses.replace(MISTRAL, add_qkv_bias=True, qk_layernorm=True),
           "nemotron": NEMOTRON}.items()}  # fmt: skip
LAYOUTS = {"alone": ALONE, "tp2_sp": Layout(tp=2, sequence_parallel=True), "pp2": Layout(pp=2), "dp2": Layout(dp=2)}


def config_of(layout: Layout) -> tuple[Config, TrainingConfig]:
    config = Config(name="memory", run_dir="unused")
    config.trainer.devices, config.trainer.accelerator = layout.world_size, Accelerator.cpu
    config.parallel.tensor_model_parallel_size = layout.tp
    config.parallel.pipeline_model_parallel_size = layout.pp
    config.parallel.sequence_parallel = layout.sequence_parallel
    config.parallel.use_distributed_optimizer = False
    config.data.seq_length = SEQ
    return config, TrainingConfig(global_batch_size=4 * MICRO * layout.dp, micro_batch_size=MICRO)


def allocated(groups: Groups, path) -> list[dict[str, int]]:
    """For every rank the stage, and the bytes of weights, gradients and optimizer after a step."""
    arch = open_nemo(path).arch
    options = BuildOptions(groups=groups, distributed_optimizer=False)
    state = TrainState.start(load_model(path, groups), OptimConfig(), max_steps=3, options=options)
    batch = samples(arch, first=0, count=MICRO, seq_length=SEQ)
    head = HeadLoss(vocab_size=arch.vocab_size, kl_weight=0.0, cross_entropy_weight=1.0, group=groups.tp)
    state.zero_gradients()
    batch_sums(state.model, [batch], LanguageModelObjective(head), groups=groups, train=True)
    state.step()
    parameters = list(state.model.parameters())
    inner = getattr(state.optimizer, "chained_optimizers", [state.optimizer])[0].optimizer
    moments = [entry[name] for entry in inner.state.values() for name in ("exp_avg", "exp_avg_sq")]
    size = lambda tensors: sum(tensor.numel() * tensor.element_size() for tensor in tensors)  # noqa: E731
    return groups.share_json({
        "stage": groups.pp_rank, "weights": size(parameters), "optimizer": size(moments),
        "gradients": size(parameter.main_grad for parameter in parameters),
    })  # fmt: skip


@pytest.mark.parametrize(
    ("layout", "model"),
    [("alone", "nemotron"), ("tp2_sp", "llama"), ("pp2", "tied"), ("pp2", "llama"), ("dp2", "llama")],
)
def test_weights_gradients_and_optimizer_are_exact_on_every_rank(layout, model, tmp_path):
    config, training = config_of(LAYOUTS[layout])
    path = random_nemo(tmp_path / "m.nemo", MODELS[model]).path
    for rank in run_layout(allocated, LAYOUTS[layout], path):
        estimate = stage_memory(config, training, rank.pop("stage"), student=MODELS[model], teacher=None)
        assert {name: estimate[name] for name in rank} == rank


def kept_bytes(groups: Groups, path, recomputes: tuple[Recompute, ...]) -> list[int]:
    """For each recomputation what the layers keep of one micro-batch for its backward pass, on the first rank."""
    return [_kept_bytes(groups, path, recompute) for recompute in recomputes]


def _kept_bytes(groups: Groups, path, recompute: Recompute) -> int:
    """Parameters and the model's tables are left out."""
    source = open_nemo(path)
    model = build_model(source.arch, BuildOptions(groups=groups, recompute=recompute))
    load_weights(model, source.weights, groups)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if (
            tensor.is_floating_point()
            and storage.data_ptr() not in own
            and storage.nbytes() >= MICRO * SEQ // groups.layout.cp * 48
        ):
            kept[storage.data_ptr()] = storage
        return tensor

    tokens = samples(source.arch, first=0, count=MICRO, seq_length=SEQ)["tokens"][:, : SEQ // groups.layout.cp]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model[0](tokens, torch.arange(tokens.shape[1]).expand_as(tokens), None)
    held = sum(storage.nbytes() for storage in kept.values())
    return held if output.requires_grad else 0


@pytest.mark.parametrize("model", MODELS)
def test_activations_are_good_to_the_stated_tolerance(model, tmp_path):
    arch = dataclasses.replace(MODELS[model], num_layers=6)
    config, training = config_of(ALONE)
    path = random_nemo(tmp_path / "m.nemo", arch).path
    (measured,) = run_layout(kept_bytes, ALONE, path, RECOMPUTES[:1])
    estimate = stage_memory(config, training, 0, student=arch, teacher=None)["activations"]
    assert estimate == pytest.approx(measured, rel=TOLERANCE)


RECOMPUTES = (
    Recompute(),
    Recompute("selective", modules=("core_attn",)),
    Recompute("selective", modules=("mlp",)),
    Recompute("full", "uniform", 2),
    Recompute("full", "block", 4),
)


def test_activations_of_part_of_a_sequence_and_what_recomputation_saves_are_too(tmp_path):
    arch, layers = dataclasses.replace(MODELS["llama"], num_layers=6), 6
    path = random_nemo(tmp_path / "m.nemo", arch).path
    measured = run_layout(kept_bytes, Layout(cp=2), path, RECOMPUTES)
    for recompute, kept in zip(RECOMPUTES, measured, strict=True):
        estimate = 4 * MICRO * SEQ // 2 * kept_by_stage(Stages.of(arch, Layout(cp=2), None), 0, 4, recompute=recompute)
        # And of one unit at a time what is computed again.
        again = (measured[0] - kept) / layers * (recompute.num_layers if recompute.method == "uniform" else 1)
        assert estimate == pytest.approx(kept + again, rel=TOLERANCE), recompute


def test_the_first_stage_holds_as_many_micro_batches_as_there_are_stages():
    arch = dataclasses.replace(LLAMA, num_layers=8)
    config, training = config_of(Layout(pp=4))
    activations = [stage_memory(config, training, n, student=arch, teacher=arch)["activations"] for n in range(4)]
    assert [value / activations[3] for value in activations] == [4, 3, 2, 1]
    stages = [stage_memory(config, training, n, student=arch, teacher=arch) for n in range(4)]
    assert [("head" in stage, "teacher states" in stage) for stage in stages] == [(False, False)] * 3 + [(True, True)]
    most, parts = training_memory(config, training, student=arch, teacher=arch)
    assert sum(parts.values()) == max(sum(stage.values()) for stage in stages) == sum(stages[most].values())


def test_a_window_bounds_the_teacher_states_of_the_published_settings():
    arch = dataclasses.replace(LLAMA, num_layers=32, hidden_size=4096)
    config, training = config_of(Layout(tp=2, pp=2, dp=2))
    config.trainer.accelerator, config.data.seq_length = Accelerator.gpu, 8192
    training.global_batch_size, training.micro_batch_size = 1152, 1
    sizes = {}
    for config.distill.teacher_window in (0, 32):
        found = stage_memory(config, training, 1, student=arch, teacher=arch)
        assert found["contexts"] == CONTEXTS
        sizes[config.distill.teacher_window] = found["teacher states"] / 2**30
    assert sizes == {0: 36.0, 32: 2.0}


def test_hidden_states_of_the_teacher_wait_on_the_stages_that_compare_them():
    """32 micro-batches of 8192 tokens x 4096 channels in bf16 are 2 GiB for each state."""
    arch = dataclasses.replace(LLAMA, num_layers=32, hidden_size=4096)
    config, training = config_of(Layout(pp=2))
    config.trainer.accelerator, config.data.seq_length = Accelerator.gpu, 8192
    training.global_batch_size, training.micro_batch_size = 1152, 1
    config.distill.hidden_states.kinds = [HiddenStateKind.embeddings, HiddenStateKind.layer_outputs]

    def waiting(student: ModelArch, stage: int) -> float:
        return stage_memory(config, training, stage, student=student, teacher=arch)["hidden states"] / 2**30

    assert [waiting(arch, stage) for stage in range(2)] == [2.0 * 17, 2.0 * 16]
    config.distill.hidden_states.student_layers = [1, 30]
    assert [waiting(arch, stage) for stage in range(2)] == [2.0 * 2, 2.0]
    narrower = dataclasses.replace(arch, hidden_size=3072)
    assert waiting(narrower, 1) == 2.0 + 16 * 3072 * 4096 / 2**30, "the map, its gradient and its two moments"


def test_parameters_of_all_ranks_are_those_of_the_model():
    arch = dataclasses.replace(LLAMA, num_layers=5)
    for layout in (Layout(), Layout(pp=2)):
        stages = Stages.of(arch, layout, None)
        assert sum(map(stages.parameters, range(layout.pp))) == arch.num_params()
