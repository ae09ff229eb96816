"""What others do with an export: transformers generates from it, lm-eval scores it, and both say what we say."""

import json

import pytest
import torch
from hf_models import save_tiny_hf
from random_scores import random_scores

from minitron_nemo.artefacts.origin import Origin
from minitron_nemo.checkpoint.formats import hf
from minitron_nemo.checkpoint.formats.nemo import NemoFolder, open_nemo
from minitron_nemo.checkpoint.source import stream
from minitron_nemo.pruning.make_plan import make_plan
from minitron_nemo.pruning.plain_forward import plain_logits
from minitron_nemo.shape.axes import shrink
from minitron_nemo.steps.prune import prune

SIZES = dict(num_layers=2, hidden_size=24, ffn_hidden_size=40, num_attention_heads=2)
NEW_TOKENS = 10


def exported_student(family, folder) -> tuple[NemoFolder, str]:
    """(a model pruned along every axis of a layer, its export)"""
    # `eos_token_id` ends no text: an end that is drawn early would leave little to compare.
    source = save_tiny_hf(folder / "in", family, num_hidden_layers=3, eos_token_id=None)
    opened = hf.open_hf(source)
    hf.import_hf(opened, folder / "teacher.nemo", tensors=stream(opened.weights), origin=Origin("teacher"))
    plan = make_plan(random_scores(opened.arch), shrink(opened.arch, **SIZES))
    student = prune(open_nemo(folder / "teacher.nemo"), plan, folder / "student.nemo", proof=False)
    hf.export_hf(student, folder / "out", origin=Origin("export"))
    return student, str(folder / "out")


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_transformers_generates_the_tokens_that_our_forward_pass_likes_best(family, tmp_path):
    from transformers import AutoModelForCausalLM

    student, folder = exported_student(family, tmp_path)
    tokens = torch.tensor([[5, 17, 99]])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    theirs = model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=NEW_TOKENS, do_sample=False)
    ours = tokens
    for _ in range(NEW_TOKENS):
        ours = torch.cat([ours, plain_logits(student.weights, ours)[:, -1:].argmax(-1)], dim=1)
    assert theirs.tolist() == ours.tolist()
    assert len(set(ours[0].tolist())) > 3, "a model that says one word would prove nothing"


TASK = """
task: tiny_words
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: ["w4", "w50", "w90"]
doc_to_target: answer
metric_list: [{{metric: acc}}]
metadata: {{version: 1}}
"""
QUESTIONS = ("w1 w2 w3", "w8 w9", "w70 w71 w72 w73")


@pytest.mark.lm_eval
def test_lm_eval_scores_an_exported_student_as_our_forward_pass_does(tmp_path, monkeypatch):
    """Of every question and choice the log-likelihood, and the share of right answers."""
    lm_eval = pytest.importorskip("lm_eval", reason="needs the extra `eval`: pip install 'minitron-nemo[eval]'")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    student, folder = exported_student("llama", tmp_path)
    choices = torch.tensor([7, 53, 93])  # the ids of w4, w50, w90
    wanted = []
    for question in QUESTIONS:
        ids = torch.tensor([[int(word[1:]) + 3 for word in question.split()]])
        wanted.append(plain_logits(student.weights, ids)[0, -1].log_softmax(-1)[choices])
    best = [int(scores.argmax()) for scores in wanted]
    answers = [best[0], best[1], (best[2] + 1) % 3]  # two of three are right
    rows = [{"question": question, "answer": answer} for question, answer in zip(QUESTIONS, answers, strict=True)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "tiny.yaml").write_text(TASK.format(data=tmp_path / "data.jsonl"))
    found = lm_eval.simple_evaluate(
        model="hf", model_args={"pretrained": folder, "dtype": "float32"}, tasks=["tiny_words"], device="cpu",
        task_manager=lm_eval.tasks.TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False),
        batch_size=1, bootstrap_iters=0, verbosity="ERROR",
    )  # fmt: skip
    assert found["results"]["tiny_words"]["acc,none"] == pytest.approx(2 / 3)
    for sample, scores in zip(found["samples"]["tiny_words"], wanted, strict=True):
        theirs = torch.tensor([float(answer[0]) for answer in sample["filtered_resps"]])
        torch.testing.assert_close(theirs, scores, rtol=0, atol=1e-5)
