"""The models a step takes, opened and checked before anything starts."""

from collections.abc import Sequence
from pathlib import Path

from minitron_nemo.checkpoint.formats.nemo import NemoFolder, open_nemo
from minitron_nemo.config.schema import Config
from minitron_nemo.data.tokenizer import load_tokenizer
from minitron_nemo.distributed.ranks import is_main_process
from minitron_nemo.errors import UserError


def open_verified(path: str | Path | None) -> NemoFolder:
    """An input model with the hash of every file checked, once: by the process that speaks."""
    return open_nemo(str(path), verify=is_main_process())


def check_model(config: Config, model: NemoFolder, *, name: str = "model", stages: Sequence[int] | None = None) -> None:
    """Refuse a layout or a sequence length that the model does not fit, before any rank starts."""
    config.layout.check(model.arch, name=name, stages=stages)
    if config.data.seq_length > model.arch.seq_length:
        raise UserError(
            f"data.seq_length={config.data.seq_length}: the {name} {model.path} was made for at most "
            f"{model.arch.seq_length} positions"
        )


def require_same_tokenizer(student: NemoFolder, teacher: NemoFolder) -> None:
    """Refuse two models whose token ids mean different things."""
    if student.arch.vocab_size != teacher.arch.vocab_size:
        raise UserError(
            f"{student.path} has a vocabulary of {student.arch.vocab_size}, {teacher.path} one of "
            f"{teacher.arch.vocab_size}: distillation compares token by token, so both need the same tokenizer"
        )
    ours, theirs = load_tokenizer(student.tokenizer), load_tokenizer(teacher.tokenizer)
    if ours.fingerprint != theirs.fingerprint:
        raise UserError(
            f"{student.path} and {teacher.path} carry different tokenizers ({ours.fingerprint[:12]}, "
            f"{theirs.fingerprint[:12]}): prune the student from this teacher, or give the teacher it came from"
        )
