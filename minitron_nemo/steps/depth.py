"""Which layers go: what a search over blocks is asked for, and what its result makes prune drop."""

from pathlib import Path
from typing import TYPE_CHECKING

from minitron_nemo.artefacts.manifest import manifest_sha256, read_manifest, verify_files
from minitron_nemo.artefacts.paths import is_plain_name
from minitron_nemo.config.blocks import TaskForm
from minitron_nemo.config.schema import Config
from minitron_nemo.data.tasks import TaskRun, read_task
from minitron_nemo.data.tokenizer import load_tokenizer
from minitron_nemo.errors import UserError
from minitron_nemo.importance.blocks import blocks_of, layer_evaluations, read_blocks
from minitron_nemo.shape.arch import ModelArch, billions
from minitron_nemo.steps.describe import shapes, weight_lines
from minitron_nemo.steps.forecast import time_lines
from minitron_nemo.steps.step import logger

if TYPE_CHECKING:
    from minitron_nemo.checkpoint.formats.nemo import NemoFolder


def lengths_of(config: Config, arch: ModelArch) -> list[int]:
    """The lengths of the blocks to score, ascending: 1 and what the target drops where none are given.

    Raises UserError for one that leaves no layer.
    """
    given = config.score_blocks.lengths
    if given is None:
        dropped = arch.num_layers - config.fit(arch).arch.num_layers
        given = [1, *([dropped] if dropped else [])]
    lengths = sorted(set(given))
    blocks_of(arch.num_layers, lengths)
    return lengths


def search_lines(config: Config) -> list[str]:
    """What a search costs, for a dry run."""
    arch, section = shapes(config).cut, config.score_blocks
    lengths = lengths_of(config, arch)
    layers, blocks = layer_evaluations(arch.num_layers, lengths), len(blocks_of(arch.num_layers, lengths))
    passes, seq = layers / arch.num_layers, config.data.seq_length
    tokens, head = section.num_samples * seq, 2.0 * arch.vocab_size * arch.hidden_size
    flops = passes * (arch.flops_per_token(seq) - head) + (1 + blocks) * head
    return [
        *weight_lines(config),
        f"  search    {blocks} blocks of {', '.join(map(str, lengths))} of {arch.num_layers} layers: {layers} layers a "
        f"micro-batch, {passes:.1f} whole passes; {billions(tokens)} tokens, tasks besides",
        *time_lines(config, flops * tokens),
    ]


def task_runs(config: Config, model: "NemoFolder") -> dict[str, TaskRun]:
    """The tasks of the config, read and encoded for a model. Raises UserError naming the setting or the line."""
    runs = {}
    for name, section in config.score_blocks.tasks.items():
        if not is_plain_name(name):
            raise UserError(f"score_blocks.tasks: the name {name!r} must be without '/', as it names a file")
        is_winogrande = section.form is TaskForm.winogrande
        if is_winogrande and section.normalized:
            raise UserError(f"score_blocks.tasks.{name}.normalized=true: winogrande has no acc_norm; leave it null")
        task = read_task(
            section.input,
            section.form.value,
            num_examples=section.num_examples,
            num_fewshot=section.num_fewshot,
            fewshot=section.fewshot,
        )
        tokenizer = load_tokenizer(model.tokenizer)
        bos = tokenizer.bos(True) if config.score_blocks.add_bos else None
        requests = task.requests(tokenizer, seq_length=model.arch.seq_length, bos=bos)
        highest, size = max(max(each.context + each.continuation) for each in requests), model.arch.vocab_size
        if highest >= size:
            raise UserError(f"{section.input}: its text has the id {highest}, the model has ids 0..{size - 1}")
        normalized = not is_winogrande if section.normalized is None else section.normalized
        runs[name] = TaskRun(task, requests, "acc_norm" if normalized else "acc")
    return runs


def layers_to_drop(config: Config, arch: ModelArch) -> list[int] | None:
    """The layers that the target drops, counted from 1, by its list or by the scores of blocks; None: by importance.

    Raises UserError when the scores are of another model or do not say.
    """
    target = config.prune.target
    if target.drop_by is None:
        return target.drop_layers
    folder = str(config.prune.blocks)
    verify_files(folder, read_manifest(folder, kind="blocks"))
    scores = read_blocks(folder)
    scores.check_source(arch, name=f"prune.blocks={folder}")
    count = arch.num_layers - config.fit(arch).arch.num_layers
    choose = scores.best_block if target.drop_contiguous else scores.best_layers
    try:
        return choose(target.drop_by.value, count) if count else []
    except UserError as error:
        raise UserError(f"prune.blocks={folder}: {error}") from None


def depth_parents(config: Config) -> dict[str, Path]:
    """The scores of blocks that a plan rests on; refused when they are not there."""
    if config.prune.target.drop_by is None or config.prune.plan is not None:
        return {}
    scored = read_manifest(str(config.prune.blocks), kind="blocks").parents.get("model")
    if scored != manifest_sha256(str(config.prune.checkpoint)):
        # Allowed as it is for importance: paper 2 also cuts the teacher as it was before its correction.
        logger.warning(f"prune: {config.prune.blocks} is of another model of this shape than {config.prune.checkpoint}")
    return {"blocks": Path(str(config.prune.blocks))}
