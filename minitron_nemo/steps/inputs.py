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


def require(*paths: str | Path | None, kind: str = "model") -> None:
    """Refuse inputs that are not there: at once, before torch is imported or another input of gigabytes is hashed."""
    for path in paths:
        read_manifest(str(path), kind=kind)


def open_verified(path: str | Path | None) -> "NemoFolder":
    """An input model with the hash of every file checked, once: by the process that speaks."""
    require(path)
    from minitron_nemo.checkpoint.formats.nemo import open_nemo  # brings torch

    return open_nemo(str(path), verify=is_main_process())


def check_model(
    config: Config, model: "NemoFolder", *, name: str = "model", stages: Sequence[int] | None = None
) -> None:
    """Refuse a layout or a sequence length that the model does not fit, before any rank starts."""
    config.layout.check(model.arch, name=name, stages=stages)
    if config.data.seq_length > model.arch.seq_length:
        raise UserError(
            f"data.seq_length={config.data.seq_length}: the {name} {model.path} was made for at most "
            f"{model.arch.seq_length} positions"
        )


def require_same_tokenizer(student: "NemoFolder", teacher: "NemoFolder") -> None:
    """Refuse two models whose token ids mean different things."""
    from minitron_nemo.data.tokenizer import load_tokenizer

    if student.arch.vocab_size != teacher.arch.vocab_size:
        raise UserError(
            f"{student.path} has a vocabulary of {student.arch.vocab_size}, {teacher.path} one of "
            f"{teacher.arch.vocab_size}: they are compared token by token, which needs one vocabulary; "
            "cut the teacher to the same words (prune.target.vocab_size alone), or leave the student its vocabulary"
        )
    ours, theirs = load_tokenizer(student.tokenizer), load_tokenizer(teacher.tokenizer)
    if ours.fingerprint != theirs.fingerprint:
        raise UserError(
            f"{student.path} and {teacher.path} carry different tokenizers ({ours.fingerprint[:12]}, "
            f"{theirs.fingerprint[:12]}): prune the student from this teacher, or give the teacher it came from"
        )
