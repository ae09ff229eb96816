"""Tasks of choices: what the lines say, how they are encoded and scored, which lines are refused."""

import json

import pytest
from hf_models import save_tiny_tokenizer

from minitron_nemo.data.tasks import LINE_LIMIT, Request, encode, read_task
from minitron_nemo.data.tokenizer import load_tokenizer, train_tokenizer
from minitron_nemo.errors import UserError

WINOGRANDE = {"sentence": "The cup broke because _ was thin.", "option1": "it", "option2": "the table", "answer": "2"}
ARC = {"question": "What melts?", "choices": {"text": ["Ice", "Iron ore"], "label": ["A", "B"]}, "answerKey": "A"}
HELLASWAG = {"activity_label": "Baking", "ctx_a": "He mixes [step] flour.", "ctx_b": "then he", "label": 1,
             "endings": ["sleeps.", "[title] Bake [sub] it."]}  # fmt: skip
LINES = {"winogrande": WINOGRANDE, "arc": ARC, "hellaswag": HELLASWAG}


def write(folder, *records):
    path = folder / "task.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in records))
    return path


def test_the_texts_are_those_of_the_harness(tmp_path):
    """By hand from the task files of lm-evaluation-harness."""
    (example,) = read_task(write(tmp_path, WINOGRANDE), "winogrande").examples
    assert example.contexts == ("The cup broke because it", "The cup broke because the table")
    assert example.continuations == (" was thin.", " was thin.")
    assert example.gold == 1
    assert example.solved == "The cup broke because the table was thin."
    (example,) = read_task(write(tmp_path, ARC), "arc").examples
    assert example.contexts == ("Question: What melts?\nAnswer:",) * 2
    assert example.continuations == (" Ice", " Iron ore")
    assert example.lengths == (3, 8)
    assert example.gold == 0
    (example,) = read_task(write(tmp_path, HELLASWAG), "hellaswag").examples
    assert example.contexts == ("Baking: He mixes flour. Then he",) * 2
    assert example.continuations == (" sleeps.", "  Bake it."), "nothing is stripped after the marks"
    assert example.gold == 1


def test_solved_examples_come_before_with_an_empty_line_after_each(tmp_path):
    shots = tmp_path / "shots.jsonl"
    shots.write_text("".join(json.dumps({**ARC, "question": q}) + "\n" for q in ("One?", "Two?", "Three?")))
    path = write(tmp_path, ARC, ARC, ARC)
    task = read_task(path, "arc", num_examples=2, num_fewshot=2, fewshot=shots)
    assert task.before == "Question: One?\nAnswer: Ice\n\nQuestion: Two?\nAnswer: Ice\n\n"
    assert len(task.examples) == 2
    assert task.fingerprint != read_task(path, "arc", num_examples=2).fingerprint
    with pytest.raises(UserError, match="3 examples, num_fewshot=4"):
        read_task(path, "arc", num_fewshot=4, fewshot=shots)
    with pytest.raises(UserError, match="needs a file"):
        read_task(path, "arc", num_fewshot=1)


def test_accuracy_is_of_the_likeliest_and_normed_of_the_likeliest_by_character(tmp_path):
    task = read_task(write(tmp_path, ARC, ARC), "arc")
    # The first is right both ways; of the second the longer choice wins per character: -8/8 > -6/3.
    assert task.accuracies([-2.0, -8.0, -6.0, -8.0]) == {"acc": 1.0, "acc_norm": 0.5}
    assert task.accuracies([-3.0, -3.0, -9.0, -3.0])["acc"] == 0.5, "of equal choices the first counts"
    assert read_task(write(tmp_path, WINOGRANDE), "winogrande").accuracies([-1.0, -0.5]) == {"acc": 1.0}


def test_a_pair_is_encoded_as_running_text_and_the_context_loses_its_beginning(tmp_path):
    words = load_tokenizer(save_tiny_tokenizer(tmp_path / "words"))
    request = encode(words, "w1 w2 w3", " w4 w5", seq_length=64)
    assert request == Request((4, 5, 6), (7, 8))
    assert request.inputs == (4, 5, 6, 7), "the last token is predicted and never given"
    assert encode(words, "w1 w2 w3", " w4 w5", seq_length=64, bos=1).context == (1, 4, 5, 6)
    assert encode(words, "w1 w2 w3", " w4 w5", seq_length=3) == Request((5, 6), (7, 8))
    assert encode(words, "", "w4 w5", seq_length=3) == Request((words.eod,), (7, 8))
    with pytest.raises(UserError, match="has 2 tokens, a model of 1 positions"):
        encode(words, "w1", " w4 w5", seq_length=1)
    bytes_ = train_tokenizer(["low lower lowest " * 9], vocab_size=262, output=tmp_path / "bytes")
    request = encode(bytes_, "low ", "lower", seq_length=64)
    assert list(request.context) == bytes_.encode("low")
    assert list(request.context + request.continuation) == bytes_.encode("low lower")


@pytest.mark.parametrize(
    ("form", "line", "says"),
    [
        ("arc", "{", "Expecting"),
        ("arc", "[]", "expected a JSON object"),
        ("arc", {**ARC, "answerKey": "C"}, "answerKey=C must be one of"),
        ("arc", {**ARC, "choices": {"text": ["Ice"], "label": ["A"]}}, "list of 2 to 64"),
        ("arc", {**ARC, "choices": {"text": ["Ice", "Tin"], "label": ["A"]}}, "label must be a list"),
        ("arc", {**ARC, "choices": 3}, "expected a JSON object"),
        ("arc", {"question": "What?"}, "expected a JSON object"),
        ("arc", {**ARC, "question": "\ud800"}, "half of a surrogate pair"),
        ("arc", WINOGRANDE, "arc needs question, choices"),
        ("winogrande", {**WINOGRANDE, "sentence": "No blank."}, "must have a blank"),
        ("winogrande", {**WINOGRANDE, "sentence": "Ends in _"}, "text after it"),
        ("winogrande", {**WINOGRANDE, "answer": "3"}, "answer=3 must be 1 or 2"),
        ("winogrande", {**WINOGRANDE, "option2": ""}, "option2 must be a text"),
        ("hellaswag", {**HELLASWAG, "label": "2"}, "label=2 must be 0 to 1"),
        ("hellaswag", {**HELLASWAG, "label": -1}, "label=-1 must be 0 to 1"),
        ("hellaswag", {**HELLASWAG, "endings": ["a", "[b]"]}, "a choice is empty"),
        ("hellaswag", {**HELLASWAG, "ctx_b": None}, "ctx_b must be a text"),
        ("arc", "x" * (LINE_LIMIT + 1), f"more than {LINE_LIMIT} bytes"),
    ],
)
def test_a_broken_line_is_refused_by_file_and_line(form, line, says, tmp_path):
    path = write(tmp_path, LINES[form], "", line)
    with pytest.raises(UserError) as caught:
        read_task(path, form)
    assert str(caught.value).startswith(f"{path}, line 3: ")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_are_none_are_refused(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="cannot be read: No such file"):
        read_task(tmp_path / "absent.jsonl", "arc")
    with pytest.raises(UserError, match="holds no example of arc"):
        read_task(write(tmp_path, ""), "arc")
    monkeypatch.setattr("minitron_nemo.data.tasks.FILE_LIMIT", 10)
    with pytest.raises(UserError, match="no such task needs more than 10"):
        read_task(write(tmp_path, ARC), "arc")
