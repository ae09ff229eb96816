"""Hours and disk of a dry run, against figures worked out by hand and against what is really written."""

import re

import pytest

from minitron_nemo.config.compose import compose
from minitron_nemo.errors import UserError
from minitron_nemo.steps.describe import describe, training_lines, weight_lines
from minitron_nemo.steps.forecast import checkpoint_sizes, model_size, token_bytes
from minitron_nemo.steps.teacher_memory import teacher_states
from recipes import distill, import_hf


def line(name: str, config, section="distill") -> str:
    lines = training_lines(config, getattr(config, section).training, with_teacher=section == "distill")
    return next(text for text in lines if text.split()[0] == name)


def test_hours_are_those_of_the_sum_on_paper():
    """Llama-3.1-8B: 6 N with the head and without the embedding, plus causal attention; 100 B tokens on one node."""
    config = compose("llama31_width")
    without_embedding = 8.03e9 - 128256 * 4096
    flops = 100e9 * (6 * without_embedding + 3 * 2 * 8192 * 4096 * 32)
    hours = flops / (8 * 0.4 * 989e12) / 3600
    said = line("time", config, "correct_teacher")
    assert float(re.search(r"(\d+) hours on 8 GPUs", said)[1]) == pytest.approx(hours, rel=0.02)
    assert "assuming 40% of the 989 TFLOP/s of an H100" in said


def test_four_times_the_nodes_take_a_quarter_of_the_hours_and_as_many_gpu_hours():
    one, four = (line("time", compose("llama31_width", [f"trainer.num_nodes={n}"])) for n in (1, 4))
    numbers = [[float(number) for number in re.findall(r"(\d+) (?:GPU )?hours", text)] for text in (one, four)]
    assert numbers[0][0] == pytest.approx(4 * numbers[1][0], rel=0.02)
    assert numbers[0][1] == pytest.approx(numbers[1][1], rel=0.02)


def test_a_run_on_the_cpu_is_given_no_hours_of_a_gpu():
    config = compose("quickstart", ["trainer.accelerator=cpu"])
    assert not [text for text in training_lines(config, config.distill.training, with_teacher=True) if "H100" in text]


def test_the_memory_of_a_teacher_that_lies_elsewhere_is_that_of_the_sum_on_paper():
    """Llama-3.1-8B in bf16, tensor parallel over 2 of 8 ranks: of each layer a part, two layers in full, both ends."""
    settings, of = "distill.teacher_parallel.", {}
    layer = (4096 * (32 + 2 * 8) * 128 + 32 * 128 * 4096 + 3 * 4096 * 14336) // 2 + 2 * 4096
    ends = 2 * 128256 * 4096 // 2 + 4096
    for name, overrides in {
        "here": [],
        "shared": [f"{settings}shard_weights=true"],
        "host": [f"{settings}cpu_offloading_weights=true"],
        "both": [f"{settings}shard_weights=true", f"{settings}cpu_offloading_weights=true"],
        "one": [f"{settings}tensor_model_parallel_size=1", f"{settings}shard_weights=true"],
    }.items():
        config = compose("llama31_width", ["parallel.tensor_model_parallel_size=2", *overrides])
        of[name] = training_lines(config, config.distill.training, with_teacher=True)
    found = {name: float(re.search(r"teacher ([\d.]+)", lines[1])[1]) * 2**30 / 2 for name, lines in of.items()}
    near = lambda parameters: pytest.approx(parameters, abs=0.0051 * 2**30 / 2)  # noqa: E731 (as it is printed)
    assert found["here"] == near(ends + 32 * layer)
    assert found["shared"] == near(ends + 2 * layer + 32 * layer / 4)
    assert found["host"] == found["both"] == near(ends + 2 * layer)
    whole = 2 * layer - 2 * 4096  # of tensor degree 1; its embedding is whole, its head split as the student's
    assert found["one"] == near(1.5 * (ends - 4096) + 4096 + 2 * whole + 32 * whole / 8)
    assert of["host"][2] == f"  beside    teacher: layers in host memory, {32 * layer * 2 / 2**30:.2f} GiB a rank"
    assert of["both"][2] == (
        "  beside    teacher: weights of layers shared out over 4 ranks; layers in host memory, "
        f"{8 * layer * 2 / 2**30:.2f} GiB a rank"
    )
    assert of["one"][2] == (
        "  beside    teacher: tensor 1, pipeline 1, data 8; weights of layers shared out over 8 ranks"
    )


def test_teacher_states_that_wait_are_those_of_the_window_and_of_its_own_copy():
    for tp, own, pp, window, states in ((2, 2, 1, 0, 1), (2, 1, 1, 0, 3), (1, 2, 1, 0, 2), (2, 2, 2, 16, 16),
                                        (2, 1, 2, 16, 24), (1, 2, 2, 16, 32)):  # fmt: skip
        config = compose("llama31_width", [
            f"parallel.tensor_model_parallel_size={tp}", f"parallel.pipeline_model_parallel_size={pp}",
            f"distill.teacher_parallel.tensor_model_parallel_size={own}", f"distill.teacher_window={window}",
            "parallel.sequence_parallel=false",
        ])  # fmt: skip
        assert teacher_states(config, window or 144) == states


def test_the_disk_of_the_published_run():
    """4.51 B parameters: 2 bytes and 12 of the optimizer each; two kept and one being written; then the model."""
    config = compose("llama31_width")
    assert "199 GB (3 x training checkpoint of 63 GB: 190 GB, model 9 GB)" in line("disk", config)
    assert "376 GB to read: 94 B x 4 bytes" in line("tokens", config)


def test_checkpoints_that_are_not_made_take_no_disk():
    config = compose("llama31_width", ["distill.training.save_every_n_steps=0"])
    assert "training checkpoint" not in line("disk", config)
    short = compose("llama31_width", ["distill.training.max_steps=150"]).distill.training
    assert list(checkpoint_sizes(config, short, config.model_arch())) == ["1 x training checkpoint of 112 GB:"]


def test_every_rank_writes_the_optimizer_where_it_is_not_shared():
    shared = compose("llama31_width")
    whole = compose("llama31_width", ["parallel.use_distributed_optimizer=false"])
    arch, training = shared.model_arch(), shared.distill.training
    a, b = (sum(checkpoint_sizes(config, training, arch).values()) for config in (shared, whole))
    assert a == 3 * 14 * arch.num_params()
    assert b == 3 * (2 + 12 * shared.layout.dp) * arch.num_params()


def test_weights_are_counted_in_the_precision_of_the_run():
    arch = compose("llama31_width").model_arch()
    for overrides, size in (([], 2), (["trainer.precision=fp32"], 4), (["trainer.accelerator=cpu"], 4),
                            (["trainer.accelerator=cpu", "trainer.precision=bf16"], 2)):  # fmt: skip
        assert model_size(compose("llama31_width", overrides), arch) == size * arch.num_params()


def test_a_step_that_runs_a_model_forward_says_the_memory_of_its_precision():
    """8.03 B parameters over two tensor-parallel ranks, two bytes each or four."""
    for precision, gib in (("bf16", 7.48), ("fp32", 14.96)):
        config = compose("llama31_width", [f"trainer.precision={precision}"])
        assert weight_lines(config) == [f"  memory    {gib:.2f} GiB a rank for {precision} weights"]


def test_tokens_have_the_bytes_that_megatron_gives_them():
    import numpy as np
    from megatron.core.datasets.indexed_dataset import DType

    for size in (300, 65499, 65500, 65536, 128256):
        assert token_bytes(size) == np.dtype(DType.optimal_dtype(size)).itemsize


def test_a_step_of_one_process_needs_no_model_for_its_dry_run(tmp_path):
    """Its shape comes from a folder; a step on ranks must know what it lays out."""
    (tmp_path / "own.yaml").write_text("defaults: [schema, _self_]\nname: own\nimport_hf: {source: /somewhere}\n")
    config = compose("own", ["dry_run=true"], config_dir=tmp_path)
    assert "shapes    not known" in describe(import_hf.RECIPE, config)
    with pytest.raises(UserError, match=r"model\.num_layers is not set"):
        describe(distill.RECIPE, config)
