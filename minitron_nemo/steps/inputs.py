"""The models a step takes, opened and checked before anything starts."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from minitron_nemo.artefacts.manifest import read_manifest
from minitron_nemo.config.schema import Config
from minitron_nemo.distributed.ranks import is_main_process
from minitron_nemo.errors import UserError

if TYPE_CHECKING:
    from minitron_nemo.checkpoint.formats.nemo import NemoFolder
    from minitron_nemo.checkpoint.source import TensorSource


def require(*paths: str | Path | None, kind: str = "model") -> None:
    """Refuse inputs that are not there: at once, before torch is imported or another input of gigabytes is hashed."""
    for path in paths:
        read_manifest(str(path), kind=kind)


def open_verified(path: str | Path | None) -> "NemoFolder":
    """An input model with the hash of every file checked, once: by the process that speaks."""
    require(path)
    from minitron_nemo.checkpoint.formats.nemo import open_nemo  # brings torch

    return open_nemo(str(path), verify=is_main_process())


def open_to_stream(path: str | Path | None) -> "NemoFolder":
    """An input model that one process streams: what holds its weights is hashed while it is read."""
    require(path)
    from minitron_nemo.checkpoint.formats.nemo import open_nemo

    return open_nemo(str(path), verify_while_read=True)


def check_model(
    config: Config,
    model: "NemoFolder",
    *,
    name: str = "model",
    stages: Sequence[int] | None = None,
    trained: bool = False,
) -> None:
    """Refuse a layout, a sequence length or a recomputation that the model does not fit, before any rank starts."""
    config.layout.check(model.arch, name=name, stages=stages)
    if trained:
        config.parallel.recompute.check(config.layout.stages(model.arch.num_layers, stages))
    check_positions(config, model, name=name)


def check_teacher(config: Config, teacher: "NemoFolder", *, name: str) -> None:
    """The same for a teacher of a distillation, whose layout is its own."""
    stages = config.parallel.teacher_stage_layers
    config.distill.teacher_parallel.check_teacher(teacher.arch, config.layout, name=name, stages=stages)
    check_positions(config, teacher, name=name)


def check_positions(config: Config, model: "NemoFolder", *, name: str) -> None:
    """Refuse sequences longer than those that a model was made for."""
    if config.data.seq_length > model.arch.seq_length:
        raise UserError(
            f"data.seq_length={config.data.seq_length}: the {name} {model.path} was made for at most "
            f"{model.arch.seq_length} positions"
        )


def weights_beside(model: "NemoFolder", reference: "NemoFolder") -> "TensorSource":
    """The weights of the model that `model` is compared with token by token, cut to its words where it has fewer.

    Raises UserError for two models whose token ids mean different things.
    """
    from minitron_nemo.data.tokenizer import load_tokenizer

    sizes = {"fewer_size": model.arch.vocab_size, "whole_size": reference.arch.vocab_size}
    if sizes["fewer_size"] > sizes["whole_size"]:
        raise UserError(
            f"{model.path} has a vocabulary of {model.arch.vocab_size}, {reference.path} only "
            f"{reference.arch.vocab_size}: they are compared token by token; give a teacher that knows every word"
        )
    if sizes["fewer_size"] < sizes["whole_size"]:
        from minitron_nemo.data.prune_tokenizer import rows_kept
        from minitron_nemo.pruning.cut import PrunedSource
        from minitron_nemo.pruning.plan import of_words

        kept = rows_kept(model.tokenizer, reference.tokenizer, **sizes)
        return PrunedSource(reference.weights, of_words(reference.arch, kept))
    ours, theirs = load_tokenizer(model.tokenizer), load_tokenizer(reference.tokenizer)
    if ours.fingerprint != theirs.fingerprint:
        raise UserError(
            f"{model.path} and {reference.path} carry different tokenizers ({ours.fingerprint[:12]}, "
            f"{theirs.fingerprint[:12]}): prune the student from this teacher, or give the teacher it came from"
        )
    return reference.weights
