"""Every setting refuses what it cannot mean, in one line; defaults, places and fingerprints come from the schema."""

import dataclasses
import json
import subprocess
import sys
import time
import typing
from enum import Enum

import pytest
from omegaconf import OmegaConf

from minitron_nemo.config.compose import COMPOSITION_ERRORS, CONF_DIR, Composition, compose
from minitron_nemo.config.parallel import Recompute
from minitron_nemo.config.rules import (
    check_distillation,
    check_one_chunk,
    check_ranks,
    check_samples,
    check_training,
)
from minitron_nemo.config.schema import Config, Precision, StepConfig, TrainingConfig, identity
from minitron_nemo.config.setting import check_ranges, inner_section, path, setting, setting_of
from minitron_nemo.distributed.layout import Layout
from minitron_nemo.errors import UserError
from minitron_nemo.shape.arch import ModelArch

SOURCE = ModelArch(
    num_layers=4, hidden_size=48, ffn_hidden_size=80, num_attention_heads=8, num_query_groups=4, kv_channels=8,
    vocab_size=131, seq_length=128,
)  # fmt: skip
# What 0 means something in; every other number begins above it.
MAY_BE_ZERO = {
    "seed", "first_sample", "teacher_window", "cached_tokens", "min_lr", "num_fewshot", "warmup_steps", "weight_decay",
    "betas", "gradient_clip_val", "val_check_interval", "save_every_n_minutes", "save_every_n_steps", "init_method_std",
    "kl_weight", "cross_entropy_weight", "cpu_offloading_num_layers", "prefetch_layers",
}  # fmt: skip
VALUES = {
    "wrong type": "certainly not",
    "negative": -1,
    "zero": 0,
    "huge": 10**13,
    "fraction": 1.5,
    "nan": float("nan"),
    "infinite": float("inf"),
    "empty": "",
    "blank": "  ",
    "list": [1, 2, 3],
    "negative in a list": [-1, -1],
    "mapping": {"a": -1},
    "null": None,
    "bool": True,
}


def sections(schema=Config):
    """Every dataclass of the schema."""
    found = {schema}
    for hint in typing.get_type_hints(schema).values():
        if (inner := inner_section(hint)) is not None:
            found |= sections(inner)
    return found


LEAVES = sorted(
    (
        (schema, field)
        for schema in sections()
        for field in dataclasses.fields(schema)
        if inner_section(typing.get_type_hints(schema)[field.name]) is None
    ),
    key=lambda leaf: (leaf[0].__name__, leaf[1].name),
)


def numeric(schema, name):
    hint = typing.get_type_hints(schema)[name]
    return bool({int, float} & {hint, *typing.get_args(hint)} | {list[int]} & set(typing.get_args(hint)))


def value_after(schema, name, value):
    """The value a field takes in a section of its own, or the exception that refused it."""
    node = OmegaConf.structured(schema)
    for field in dataclasses.fields(schema):  # what is required is not what is asked here
        if OmegaConf.is_missing(node, field.name) and field.name != name:
            kind = typing.get_type_hints(schema)[field.name]
            node[field.name] = "given" if kind is str else next(iter(kind)) if issubclass(kind, Enum) else 2
    try:
        OmegaConf.update(node, name, value)
        section = OmegaConf.to_object(node)
        check_ranges(section, "section.")
    except (UserError, *COMPOSITION_ERRORS) as error:
        return error
    return getattr(section, name)


@pytest.mark.parametrize(("schema", "field"), LEAVES, ids=lambda part: getattr(part, "__name__", None) or part.name)
def test_no_setting_takes_what_it_cannot_mean(schema, field):
    for kind, value in VALUES.items():
        started = time.monotonic()
        taken = value_after(schema, field.name, value)
        assert time.monotonic() - started < 30, f"{kind}: a hang, or near one"
        if isinstance(taken, Exception):
            if isinstance(taken, UserError):
                assert str(taken).startswith(f"section.{field.name}"), taken
                assert "\n" not in str(taken)
            continue
        entries = taken if isinstance(taken, list) else list(taken.values()) if isinstance(taken, dict) else [taken]
        for entry in entries:
            assert not isinstance(entry, str) or entry.strip(), f"{kind}: {taken!r}"
            if numeric(schema, field.name) and entry is not None:
                assert 0 <= entry < 10**13, f"{kind}: {taken!r}"  # also false for nan
                assert entry > 0 or field.name in MAY_BE_ZERO, f"{kind}: {taken!r}"


@pytest.mark.parametrize(("schema", "field"), LEAVES, ids=lambda part: getattr(part, "__name__", None) or part.name)
def test_every_setting_says_what_it_is_and_every_number_its_range(schema, field):
    known = setting_of(field)
    assert known.help
    assert len(known.help.splitlines()) == 1
    if numeric(schema, field.name):
        assert known.at_least is not None or known.above is not None
        assert known.at_most is not None or known.below is not None
    assert known.place is None or known.path
    assert known.how_it_runs or not known.path


# overrides, what the line begins with, what else it says
BAD_INPUT = [
    (["distill.training.optim.eps=-1.0"], "distill.training.optim.eps=-1.0: must be above 0", ""),
    (["distill.temperature=nan"], "distill.temperature=nan: must be a finite number", ""),
    (["distill.training.optim.betas=[0.9]"], "distill.training.optim.betas", "2 entries"),
    (["distill.training.optim.betas=[0.9,1]"], "distill.training.optim.betas", "each must be"),
    (["data.split='0,98,2'"], "data.split", "the first above 0"),
    (["+data.blend.web=0"], "data.blend.web=0.0: must be above 0", ""),
    (["data.blend.web=1"], "data.blend.web: no such entry", "+data.blend.web"),
    (["name=''"], "name=''", "empty"),
    (["run_dir=' '"], "run_dir=", "empty"),
    (["run_dir="], "run_dir=", "empty"),
    (["run_dir=null"], "run_dir=null: it cannot be null", ""),
    (["name="], "name=", "empty"),
    (["name=.."], "name=..: must be without '/'", "begin with '.'"),
    (["name=../elsewhere"], "name=../elsewhere: must be without '/'", ""),
    (["model.num_layers=1000000000000"], "model.num_layers=1000000000000: must be", "10000"),
    (["model.kv_channels=63"], "model.kv_channels=63: must be", "even"),
    (["model.family=bert"], "model.family=bert: must be one of llama", ""),
    (["model.num_query_groups=3"], "model.num_attention_heads=32: must be a multiple of", ""),
    (["model.rotary_percent=0.01"], "model.rotary_percent=0.01", "kv_channels=128"),
    (["model.rope_scaling.low_freq_factor=4"], "model.rope_scaling.low_freq_factor=4.0", "high_freq_factor"),
    (["seed=-1"], "seed=-1: must be at least 0 and at most 4294967295", ""),
    (["seed=" + "1" * 5000], "", "4300"),
    (["distill.kl_weight=0"], "distill.kl_weight=0, distill.cross_entropy_weight=0", ""),
    (["distill.top_k=5"], "distill.top_k=5: distill.divergence=forward_kl does not use it", "top_k_kl"),
    (["distill.divergence=logit_mse", "distill.temperature=2"], "distill.temperature=2.0: distill.divergence=logit_mse",
     "leave it at 1"),
    (["distill.divergence=mse"], "distill.divergence", "logit_mse"),
    (["distill.training.optim.min_lr=1"], "distill.training.optim.min_lr=1.0", "lr"),
    (["trainer.device=2"], "trainer.device: unknown key; trainer has devices", ""),
    (["+trainer.device=2"], "trainer.device: unknown key; trainer has devices", ""),
    (["+surprise=1"], "surprise: unknown key", ""),
    (["trainer=2"], "trainer", ""),
    (["trainer.devices.x=1"], "trainer.devices", ""),
    (["trainer.devices=two"], "trainer.devices", "two"),
    (["trainer.devices=1,2"], "trainer.devices=1,2", "--multirun"),
    (["pipeline.steps=[{name: x}]"], "pipeline.steps[0].recipe is not set", ""),
    (["pipeline.steps=[{recipe: prune, models: x}]"], "", "models"),
    (["pipeline.steps=[{recipe: prune, bogus: 1}]"], "bogus: unknown key", "overrides"),
    (["+prepare_data.corpora.b={glob: x}"], "prepare_data.corpora.b.input is not set", ""),
    (["+prepare_data.corpora.b={input: x, encoding: y}"], "prepare_data.corpora.b.encoding: unknown key", "glob"),
    (["+prepare_data.corpora.b=3"], "prepare_data.corpora.b", "CorpusConfig"),
    (["distill.teacher_model.num_layers=4"], "distill.teacher_model.hidden_size is not set", ""),
    (["name=${nowhere}"], "name", "nowhere"),
    (["name=${name}"], "name", "Recursive"),
    (["name=${oc.env:NO_SUCH_VARIABLE}"], "name", "NO_SUCH_VARIABLE"),
    (["trainer"], "'trainer'", "key=value"),
    (["=1"], "'=1'", "key=value"),
    (["a b=1"], "'a b=1'", "key=value"),
    (["model=llama9"], "", "llama31_8b"),
    (["model=null"], "", "~model"),
    (["~model.num_layers"], "model.num_layers", ""),
    # NeMo's words
    (["exp_manager.name=x"], "exp_manager.name: ", "run_dir"),
    (["+exp_manager.name=x"], "exp_manager: ", "keep_latest_k"),
    (["distill.training.save_top_k=3"], "distill.training.save_top_k: ", "keep_latest_k"),
    (["+distill.training.save_top_k=3"], "distill.training.save_top_k: ", "keep_latest_k"),
    (["trainer.max_steps=10"], "trainer.max_steps: ", "<section>.training.max_steps"),
    (["trainer.val_check_interval=10"], "trainer.val_check_interval: ", "<section>.training.val_check_interval"),
    (["trainer.limit_val_batches=10"], "trainer.limit_val_batches: ", "<section>.training.limit_val_batches"),
    (["trainer.gradient_clip_val=1"], "trainer.gradient_clip_val: ", "training.optim.gradient_clip_val"),
    (["trainer.precision=bf16-mixed"], "trainer.precision: ", "is bf16 here"),
    (["trainer.devices=auto"], "trainer.devices: ", "a number"),
    (["trainer.strategy=ddp"], "trainer.strategy: ", "`parallel`"),
    (["trainer.max_epochs=3"], "trainer.max_epochs: ", "<section>.training.max_steps"),
    (["trainer.limit_train_batches=3"], "trainer.limit_train_batches: ", "<section>.training.max_steps"),
    (["trainer.accumulate_grad_batches=3"], "trainer.accumulate_grad_batches: ", "global_batch_size"),
    (["trainer.enable_checkpointing=false"], "trainer.enable_checkpointing: ", "save_every_n_steps"),
    (["restore_from_path=x.nemo"], "restore_from_path: ", "<section>.checkpoint"),
    (["model.data.data_prefix=x"], "model.data", "`prepare_data`"),
    (["model.tokenizer.type=x"], "model.tokenizer", "prepare_data.tokenizer"),
    (["model.encoder_seq_length=8"], "model.encoder_seq_length: ", "data.seq_length"),
    (["model.sequence_parallel=true"], "model.sequence_parallel: ", "`parallel`"),
    (["model.activations_checkpoint_granularity=full"], "model.activations_checkpoint_granularity: ", "recompute"),
    (["model.precision=bf16"], "model.precision: ", "trainer.precision"),
]  # fmt: skip


@pytest.mark.parametrize(("overrides", "begins", "says"), BAD_INPUT, ids=lambda value: str(value)[:50])
def test_bad_input_is_one_line_that_begins_with_the_key(overrides, begins, says):
    with pytest.raises(UserError) as refusal:
        compose("llama31_width", overrides)
    line = str(refusal.value)
    assert line.startswith(begins), line
    assert says in line
    assert line.isprintable(), line


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("name: x\n", "- schema"),
        ("defaults: [schema, _self_]\n", "name is not set"),
        ("defaults: [schema, _self_]\nname: x\nexp_manager: {name: y}\n", "run_dir"),
        ("defaults: [schema, _self_]\nname: x\ntrainer: {devices: auto}\n", "a number"),
        ("defaults: [schema, _self_]\nname: x\nmodel: {num_layers: 3}\n", "model.hidden_size is not set"),
        ("defaults: [schema, nothing, _self_]\nname: x\n", "nothing"),
        ("defaults: [schema\n", "line"),
        ("- a\n- b\n", ""),
        ('defaults: [schema, _self_]\nname: "a\\0b"\n', "NUL"),
    ],
)
def test_a_wrong_file_is_refused_in_one_line(text, says, tmp_path):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(UserError) as refusal:
        compose("mine", config_dir=tmp_path)
    assert says in str(refusal.value)
    assert str(refusal.value).isprintable()


def test_refusing_is_quick_and_needs_no_torch():
    code = (
        "import sys; from minitron_nemo.cli import run_task\n"
        "code = run_task('distill', '', task=None, arguments=['--config-name', 'llama31_width', 'seed=-1'])\n"
        "assert code == 2 and 'torch' not in sys.modules"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=CONF_DIR.parent, stderr=subprocess.PIPE, text=True)
    assert run.returncode == 0
    assert run.stderr == "error: seed=-1: must be at least 0 and at most 4294967295\n"


# What works that plain Hydra would not take.


def test_corpora_are_added_in_every_way_that_hydra_adds():
    for override in (
        "+prepare_data.corpora.b={input: /x}",
        "+prepare_data.corpora.b.input=/x",
        "++prepare_data.corpora.b={input: /x}",
        "+prepare_data.corpora={b: {input: /x}}",
    ):
        corpora = compose("llama31_width", [override]).prepare_data.corpora
        assert (list(corpora), corpora["b"].input, corpora["b"].glob) == (["text", "b"], "/x", "**/*")
    assert compose("quickstart", ["~prepare_data.corpora.code"]).prepare_data.corpora.keys() == {"prose"}


def test_a_section_that_is_not_there_can_be_filled_from_the_command_line():
    names = ("factor=4", "low_freq_factor=1", "high_freq_factor=4", "original_max_position_embeddings=512")
    scaling = compose("quickstart", [f"model.rope_scaling.{name}" for name in names]).model.rope_scaling
    assert dataclasses.astuple(scaling) == (4.0, 1.0, 4.0, 512)
    with pytest.raises(UserError, match=r"model.rope_scaling.low_freq_factor is not set"):
        compose("quickstart", ["model.rope_scaling.factor=4"])
    assert compose("llama31_width", ["model.rope_scaling=null"]).model.rope_scaling is None


def test_a_config_without_a_model_composes():
    config = compose("llama31_width", ["~model"])
    assert config.model is None
    with pytest.raises(UserError, match=r"model.num_layers is not set"):
        config.model_arch()
    assert compose("llama31_width").model_arch().num_layers == 32
    assert compose("llama31_width").distill.teacher_model is None


def test_a_composition_is_composed_again_with_more():
    composition = Composition("llama31_width", ("seed=1", "name=x"))
    assert (composition.compose().seed, composition.compose("seed=2").seed) == (1, 2)
    assert composition.compose("seed=2").run_dir == "runs/x"


# Places


def test_paths_that_are_not_given_are_under_the_run_folder():
    config = compose("llama31_width", ["run_dir=r", "evaluate.checkpoint=/models/a.nemo"])
    assert config.distill.checkpoint == "r/pruned.nemo"
    assert config.distill.teacher == config.prune.checkpoint == "r/corrected_teacher.nemo"
    assert config.evaluate.output == "r/eval/a.json"
    assert config.export_hf.output == "r/student_hf"
    assert config.prune.plan is None


# Rules


def test_the_layout_says_which_world_does_not_divide():
    config = compose("llama31_width", ["trainer.devices=3"])  # a step of one process does not ask
    with pytest.raises(UserError, match=r"^trainer.devices=3 on 1 node\(s\): 3 ranks: must be a multiple"):
        check_ranks(config)
    assert check_ranks(compose("llama31_width", ["trainer.num_nodes=2"])).dp == 8


def test_relations_of_the_ranks_are_asked_of_steps_on_ranks_alone():
    for override in ("parallel.tensor_model_parallel_size=1", "data.seq_length=8191"):
        config = compose("llama31_width", [override])
        with pytest.raises(UserError, match=r"sequence"):
            check_ranks(config)


@pytest.mark.parametrize("name", ["use_distributed_optimizer", "overlap_grad_reduce"])
def test_overlap_of_gathering_needs_what_it_rests_on(name):
    with pytest.raises(UserError, match=f"parallel.{name}=false: parallel.overlap_param_gather=true needs it"):
        check_ranks(compose("quickstart", ["parallel.overlap_param_gather=true", f"parallel.{name}=false"]))
    check_ranks(compose("quickstart", ["parallel.overlap_param_gather=true"]))


def test_a_batch_must_be_shared_by_the_data_parallel_ranks():
    training = TrainingConfig(global_batch_size=3)
    check_training(training, "distill", Layout(dp=3))
    with pytest.raises(UserError, match=r"^distill.training.global_batch_size=3: must be a multiple of"):
        check_training(training, "distill", Layout(dp=2))


def test_an_interleaved_pipeline_is_asked_of_every_number_of_micro_batches():
    interleaved = [
        "trainer.devices=4", "parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=2",
        "parallel.virtual_pipeline_model_parallel_size=2", "distill.training.global_batch_size=8",
        "distill.training.micro_batch_size=1",
    ]  # fmt: skip
    config = compose("quickstart", interleaved)
    check_distillation(config)
    with pytest.raises(UserError, match=r"^distill.teacher_window=3: 3 micro-batches"):
        check_distillation(compose("quickstart", [*interleaved, "distill.teacher_window=3"]))
    with pytest.raises(UserError, match=r"^distill.training.global_batch_size=9: 9 micro-batches"):
        check_training(TrainingConfig(global_batch_size=9), "distill", config.layout)
    check_samples(config.layout, 12, 3, name="num_samples")
    with pytest.raises(UserError, match=r"^num_samples=9: 3 micro-batches"):
        check_samples(config.layout, 9, 3, name="num_samples")
    with pytest.raises(UserError, match=r"^parallel.virtual_pipeline_model_parallel_size=2: score_blocks does"):
        check_one_chunk(config, "score_blocks")
    with pytest.raises(UserError, match=r"^parallel.context_parallel_size=2: score_blocks does not run so"):
        check_one_chunk(compose("quickstart", ["parallel.context_parallel_size=2"]), "score_blocks")
    with pytest.raises(UserError, match=r"^parallel.virtual_pipeline_model_parallel_size=2: needs pipeline"):
        check_ranks(compose("quickstart", ["parallel.virtual_pipeline_model_parallel_size=2"]))


RECOMPUTED = [
    ([], Recompute()),
    (["recompute_activations=true"], Recompute("full", "uniform", 1)),
    (["recompute_granularity=full", "recompute_method=block", "recompute_num_layers=3"], Recompute("full", "block", 3)),
    (["recompute_granularity=selective"], Recompute("selective", modules=("core_attn",))),
    (["recompute_granularity=selective", "recompute_modules=[mlp]"], Recompute("selective", modules=("mlp",))),
    (["recompute_activations=true", "recompute_granularity=full"], "parallel.recompute_activations=true: is short"),
    (["recompute_granularity=full", "recompute_num_layers=3"], "parallel.recompute_method: is not set"),
    (["recompute_granularity=full", "recompute_method=block"], "parallel.recompute_num_layers: is not set"),
    (["recompute_granularity=selective", "recompute_num_layers=3"], "parallel.recompute_num_layers: goes with"),
    (["recompute_modules=[mlp]"], "parallel.recompute_modules: goes with recompute_granularity=selective"),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "meant"), RECOMPUTED)
def test_recomputation_is_what_megatron_calls_it_or_refused(settings, meant):
    config = compose("quickstart", [f"parallel.{each}" for each in settings])
    if isinstance(meant, Recompute):
        assert config.parallel.recompute == meant
        check_ranks(config)
    else:
        with pytest.raises(UserError, match=f"^{meant}"):
            check_ranks(config)


def test_layers_that_are_recomputed_together_fill_every_chunk():
    Recompute("full", "uniform", 2).check([4, 2])
    Recompute("full", "block", 2).check([3, 1])
    with pytest.raises(UserError, match=r"^parallel.recompute_num_layers=2: .* \[4, 3\]"):
        Recompute("full", "uniform", 2).check([4, 3])


def test_positions_begin_anew_only_where_documents_are_kept_apart():
    check_ranks(compose("quickstart", ["data.reset_position_ids=true", "data.reset_attention_mask=true"]))
    with pytest.raises(UserError, match=r"^data.reset_position_ids=true: needs data.reset_attention_mask"):
        check_ranks(compose("quickstart", ["data.reset_position_ids=true"]))


def test_a_short_trial_keeps_the_long_warm_up():
    assert compose("llama31_width", ["distill.training.max_steps=5"]).distill.training.optim.warmup_steps == 40


def test_a_target_shrinks_every_axis_of_the_registry():
    target = compose("quickstart", ["prune.target={hidden_size: 24, num_attention_heads: 4}"]).prune.target
    target.ffn_hidden_size = None
    assert (target.shrink(SOURCE).hidden_size, target.shrink(SOURCE).num_attention_heads) == (24, 4)
    target.drop_layers = [1, 4]
    assert target.shrink(SOURCE).num_layers == 2
    target.hidden_size = 64
    with pytest.raises(UserError, match=r"^prune.target.hidden_size=64: pruning needs 1..48"):
        target.shrink(SOURCE)
    target.drop_layers = [5]
    with pytest.raises(UserError, match=r"counted from 1 to 4"):
        target.shrink(SOURCE)


# Fingerprints


def test_a_new_field_is_in_the_identity_unless_it_is_marked():
    class Colour(Enum):
        red = "crimson"

    @dataclasses.dataclass
    class Inner:
        depth: int = 1
        speed: int = setting(2, "", how_it_runs=True)

    @dataclasses.dataclass
    class Section:
        unmarked: int = 3
        declared: float = setting(0.5, "")
        colour: Colour = Colour.red
        where: str | None = path("")
        inner: Inner = dataclasses.field(default_factory=Inner)
        several: list[Inner] = dataclasses.field(default_factory=lambda: [Inner(4)])
        younger: int = setting(6, "", later=True)

    expected = {"unmarked": 3, "declared": 0.5, "colour": "crimson", "inner": {"depth": 1}, "several": [{"depth": 4}]}
    assert identity(Section()) == expected
    assert identity(Section(younger=7)) == expected | {"younger": 7}


def test_how_a_step_runs_is_not_in_its_identity():
    config = compose("llama31_width")
    assert set(identity(config.distill)) == {"temperature", "kl_weight", "cross_entropy_weight", "training"}
    assert set(identity(config.distill.training)) == {"max_steps", "global_batch_size", "optim"}
    assert set(identity(config.estimate_importance)) == {"num_samples", "sequence_aggregation", "batch_aggregation"}
    config.estimate_importance.criteria.num_layers = "taylor"
    assert identity(config.estimate_importance)["criteria"] == {"num_layers": "taylor"}, "what came later, where given"
    assert set(identity(config.evaluate)) == {"num_samples"}
    assert set(identity(config.prune)) == {"target"}
    first = {"num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "drop_layers"}
    assert set(identity(config.prune.target)) == first, "what was cut before newer targets were known is still known"
    assert set(identity(config.data)) == {"seq_length", "split"}
    assert identity(config.trainer) == {"precision": Precision.auto.value}
    assert identity(config.parallel) == identity(config.export_hf) == {}
    assert set(identity(StepConfig(recipe="prune"))) == {"recipe", "name", "overrides", "models"}


def test_every_identity_is_plain():
    config = compose("quickstart")
    for field in dataclasses.fields(config):
        section = getattr(config, field.name)
        if dataclasses.is_dataclass(section):
            assert json.loads(json.dumps(identity(section))) == identity(section)
