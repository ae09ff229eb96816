"""Tasks of two or more choices as JSONL: read, turned into requests, and scored, as lm-evaluation-harness does it.

One JSON object a line, in the form of the public data sets; other fields are ignored:

    winogrande   sentence with one `_`, option1, option2, answer: "1" or "2"
    arc          question, choices: {text: [...], label: [...]}, answerKey: one of the labels
    hellaswag    activity_label, ctx_a, ctx_b, endings: [...], label: number of the right one, from 0

A choice is scored by the log-likelihood of a continuation after a context. In Winogrande the choices stand in the
context, which ends with the option, and the continuation is the text after the blank. In the others the context is
`Question: ...\nAnswer:` or the beginning of the story, and the continuation is a space and the choice. `acc` counts
the examples whose right choice is the most likely, `acc_norm` those where it is after division by the choice's
characters; of equal choices the first counts. Solved examples before the context end with an empty line.

Source: lm-evaluation-harness, tasks winogrande, arc and hellaswag, and its `_encode_pair`.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitron_nemo.artefacts.strict_json import parse_json
from minitron_nemo.data.tokenizer import Tokenizer
from minitron_nemo.errors import UserError

FILE_LIMIT = 256 * 2**20  # bytes; the largest of these data sets has a fifth of it
LINE_LIMIT = 2**20
MAX_CHOICES = 64


@dataclass(frozen=True)
class Example:
    """A context and a continuation for each choice; `lengths` are the choices' characters, `gold` the right one."""

    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
    lengths: tuple[int, ...]
    gold: int

    @property
    def solved(self) -> str:
        """The example with its answer, as it stands before another."""
        return self.contexts[self.gold] + self.continuations[self.gold]


@dataclass(frozen=True)
class Request:
    """Token ids of a context and its continuation; what a model is given is all but the last."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]

    @property
    def inputs(self) -> tuple[int, ...]:
        return (self.context + self.continuation)[:-1]


@dataclass(frozen=True)
class Task:
    """Examples, the text before each, and what they were read from as a SHA-256."""

    form: str
    examples: list[Example]
    before: str
    fingerprint: str

    def requests(self, tokenizer: Tokenizer, *, seq_length: int, bos: int | None = None) -> list[Request]:
        """A request for each choice of each example, in order.

        A context that is too long loses its beginning. UserError for a continuation that alone is.
        """
        return [
            encode(tokenizer, self.before + context, continuation, seq_length=seq_length, bos=bos)
            for example in self.examples
            for context, continuation in zip(example.contexts, example.continuations, strict=True)
        ]

    def accuracies(self, log_likelihoods: Sequence[float]) -> dict[str, float]:
        """`acc` and, where the choices are what is scored, `acc_norm`, from the values of the requests in order."""
        correct, correct_norm, place = 0, 0, 0
        for example in self.examples:
            values = log_likelihoods[place : place + len(example.contexts)]
            place += len(values)
            correct += _first_best(values) == example.gold
            normed = [value / length for value, length in zip(values, example.lengths, strict=True)]
            correct_norm += _first_best(normed) == example.gold
        total = len(self.examples)
        return {"acc": correct / total, **({} if self.form == "winogrande" else {"acc_norm": correct_norm / total})}


@dataclass(frozen=True)
class TaskRun:
    """A task with the requests of its examples, and which of its accuracies, `acc` or `acc_norm`, is its score."""

    task: Task
    requests: list[Request]
    metric: str


def read_task(
    path: str | Path,
    form: str,
    *,
    num_examples: int | None = None,
    num_fewshot: int = 0,
    fewshot: str | Path | None = None,
) -> Task:
    """The first `num_examples` of a file, each after the first `num_fewshot` of the file `fewshot`, solved.

    Raises UserError naming file and line of what is no example of this form.
    """
    if num_fewshot and fewshot is None:
        raise UserError(f"{path}: num_fewshot={num_fewshot} needs a file to take them from; set fewshot")
    examples = _read(Path(path), form, num_examples)
    shots = _read(Path(str(fewshot)), form, num_fewshot) if num_fewshot else []
    if len(shots) < num_fewshot:
        raise UserError(f"{fewshot}: {len(shots)} examples, num_fewshot={num_fewshot}; add some or ask for fewer")
    before = "".join(shot.solved + "\n\n" for shot in shots)
    content = [form, before, [[e.contexts, e.continuations, e.lengths, e.gold] for e in examples]]
    return Task(form, examples, before, hashlib.sha256(json.dumps(content).encode()).hexdigest())


def encode(
    tokenizer: Tokenizer, context: str, continuation: str, *, seq_length: int, bos: int | None = None
) -> Request:
    """A request of texts. Spaces that end the context belong to the continuation; the pair is encoded as one text, so
    that the tokens are those of the running text. `bos` begins the context; the end-of-document token stands for an
    empty one.
    """
    stripped = context.rstrip()
    before = tokenizer.encode(stripped)
    whole = tokenizer.encode(context + continuation)
    after = whole[len(before) :]
    first = [bos] if bos is not None else [] if before else [tokenizer.eod]
    if not after or len(after) > seq_length:
        raise UserError(
            f"task: the continuation {continuation[:60]!r} has {len(after)} tokens, a model of {seq_length} positions "
            f"can be asked for 1 to {seq_length}"
        )
    room = seq_length + 1 - len(after)  # the last token is predicted, never given
    return Request(tuple((first + whole[: len(before)])[-room:]), tuple(after))


def _first_best(values: Sequence[float]) -> int:
    return max(range(len(values)), key=lambda place: (values[place], -place))


def _read(path: Path, form: str, count: int | None) -> list[Example]:
    examples: list[Example] = []
    for number, line in _lines(path):
        if count is not None and len(examples) == count:
            break
        try:
            examples.append(FORMS[form](_object(parse_json(line))))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {number}: {error}; {form} needs {FIELDS[form]}") from None
    if not examples:
        raise UserError(f"{path}: holds no example of {form}")
    return examples


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Lines that say something, with their numbers."""
    try:
        if (size := path.stat().st_size) > FILE_LIMIT:
            raise UserError(f"{path}: {size} bytes; no such task needs more than {FILE_LIMIT}")
        with path.open("rb") as file:
            number = 0
            while line := file.readline(LINE_LIMIT + 1):
                number += 1
                if len(line) > LINE_LIMIT:
                    raise UserError(f"{path}, line {number}: more than {LINE_LIMIT} bytes")
                if line.strip():
                    yield number, line
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def _object(record: Any) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise ValueError(f"expected a JSON object, got {type(record).__name__}")
    return record


def _text(record: dict[str, Any], key: str, *, may_be_empty: bool = False) -> str:
    value = record.get(key)
    if not isinstance(value, str) or not (may_be_empty or value.strip()):
        raise ValueError(f"{key} must be a text")
    value.encode()  # a lone surrogate is no Unicode text and raises a ValueError
    return value


def _texts(record: dict[str, Any], key: str) -> list[str]:
    values = record.get(key)
    if not isinstance(values, list) or not 2 <= len(values) <= MAX_CHOICES:
        raise ValueError(f"{key} must be a list of 2 to {MAX_CHOICES} texts")
    return [_text({key: value}, key) for value in values]


def _choices(context: str, choices: Sequence[str], gold: int) -> Example:
    if not all(choices):
        raise ValueError("a choice is empty")
    after = tuple(f" {choice}" for choice in choices)
    return Example((context,) * len(choices), after, tuple(map(len, choices)), gold)


def _winogrande(record: dict[str, Any]) -> Example:
    sentence, answer = _text(record, "sentence"), str(record.get("answer"))
    before, blank, after = sentence.partition("_")
    if not blank or not after.strip():
        raise ValueError("sentence must have a blank `_` and text after it")
    if answer not in ("1", "2"):
        raise ValueError(f"answer={answer:.20} must be 1 or 2")
    contexts = tuple(before + _text(record, option) for option in ("option1", "option2"))
    return Example(contexts, (" " + after.strip(),) * 2, tuple(map(len, contexts)), int(answer) - 1)


def _arc(record: dict[str, Any]) -> Example:
    choices = _object(record.get("choices"))
    texts, labels, key = _texts(choices, "text"), _texts(choices, "label"), _text(record, "answerKey")
    if len(labels) != len(texts) or key not in labels:
        raise ValueError(f"answerKey={key:.20} must be one of as many labels as there are texts")
    return _choices(f"Question: {_text(record, 'question')}\nAnswer:", texts, labels.index(key))


def _hellaswag(record: dict[str, Any]) -> Example:
    endings, label = _texts(record, "endings"), str(record.get("label"))
    if not label.isdecimal() or len(label) > 2 or int(label) >= len(endings):
        raise ValueError(f"label={label:.20} must be 0 to {len(endings) - 1}")
    story = _text(record, "ctx_a", may_be_empty=True) + " " + _text(record, "ctx_b", may_be_empty=True).capitalize()
    context = _without_marks(_text(record, "activity_label") + ": " + story)
    return _choices(context, [_without_marks(ending) for ending in endings], int(label))


def _without_marks(text: str) -> str:
    """Marks of WikiHow: a title begins a sentence, other words in brackets go."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


FORMS: dict[str, Callable[[dict[str, Any]], Example]] = {
    "winogrande": _winogrande,
    "arc": _arc,
    "hellaswag": _hellaswag,
}
FIELDS = {
    "winogrande": "sentence, option1, option2, answer",
    "arc": "question, choices {text, label}, answerKey",
    "hellaswag": "activity_label, ctx_a, ctx_b, endings, label",
}
