"""data.reset_attention_mask: what training, evaluation and importance see of a document is what it is alone.

Alone means: transformers' Llama of the same weights is given each document of a sample by itself.
"""

import dataclasses
import json

import pytest
import torch
from anchor_world import make_world, own_cache, rows
from layouts import ORIGIN
from torch.nn import functional

from minitron_nemo.checkpoint.formats.nemo import open_nemo
from minitron_nemo.config.schema import TrainingConfig
from minitron_nemo.data.calibration import calibration_set
from minitron_nemo.data.datasets import build_datasets
from minitron_nemo.distillation.teacher import Teacher
from minitron_nemo.engine.model import BuildOptions
from minitron_nemo.losses.lm_head import HeadLoss
from minitron_nemo.steps.estimate import estimate_importance
from minitron_nemo.steps.evaluate import evaluate_model
from minitron_nemo.steps.train import train_model
from minitron_nemo.testing import LAYOUTS, run_layout
from minitron_nemo.training.objectives import DistillationObjective

NUM_SAMPLES, END = 8, 2  # the end token of the tokenizer
TRAINING = TrainingConfig(
    max_steps=1, global_batch_size=NUM_SAMPLES, micro_batch_size=2, val_check_interval=1, limit_val_batches=1,
    save_every_n_steps=0,
)  # fmt: skip


def all_steps(groups, world, folder):
    """The evaluation and the block importance; training leaves its log under `folder`."""
    student, teacher = (open_nemo(world.nemo[role]) for role in ("student", "teacher"))
    blend = dataclasses.replace(own_cache(world.blend, folder / "index"), reset_attention_mask=True)
    options = BuildOptions(groups=groups, reset_attention_mask=True)
    head = HeadLoss(vocab_size=131, group=groups.tp)
    objective = DistillationObjective(head, Teacher(teacher.weights, options))
    train_model(student, folder / "trained.nemo", objective=objective, options=options, blend=blend, training=TRAINING,
                run_dir=folder, origin=ORIGIN, log_every_n_steps=1)  # fmt: skip
    evaluation = evaluate_model(student.weights, teacher.weights, options=options, blend=blend, num_samples=NUM_SAMPLES)
    calibration = calibration_set(blend, num_samples=NUM_SAMPLES)
    scores = estimate_importance(student.weights, calibration, options=options)
    return dataclasses.asdict(evaluation), scores["num_layers"].tolist()


def each_alone(model, tokens_BS, value):
    """`value(what the model says of a document)`, concatenated over the documents of each row: [b, s, ...]."""
    whole = []
    for row in tokens_BS:
        ends = [0, *(place + 1 for place, token in enumerate(row.tolist()) if token == END), len(row)]
        parts = [row[None, start:end] for start, end in zip(ends, ends[1:], strict=False) if end > start]
        with torch.no_grad():
            whole.append(torch.cat([value(model(part, output_hidden_states=True))[0] for part in parts]))
    return torch.stack(whole)


def cosine_of_first_layer(out):
    return functional.cosine_similarity(out.hidden_states[0], out.hidden_states[1], dim=-1)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def test_every_step_sees_a_document_as_it_is_alone(world, tmp_path):
    from transformers import AutoModelForCausalLM

    evaluation, block_importance = run_layout(all_steps, LAYOUTS["tp2_sp"], world, tmp_path)
    student, teacher = (AutoModelForCausalLM.from_pretrained(world.hf[role], dtype=torch.float32).eval()
                        for role in ("student", "teacher"))  # fmt: skip

    def means(samples):
        s, t = (each_alone(model, samples["tokens"], lambda out: out.logits).flatten(0, 1).log_softmax(-1)
                for model in (student, teacher))  # fmt: skip
        labels = samples["labels"].flatten()
        divergence = (t.exp() * (t - s)).sum(-1).mean().item()
        return {"cross_entropy": functional.nll_loss(s, labels).item(), "forward_kl": divergence}

    train, valid = build_datasets(own_cache(world.blend, tmp_path / "own"), num_train=8, num_valid=NUM_SAMPLES)
    trained, held_out = rows(train, range(NUM_SAMPLES)), rows(valid, range(NUM_SAMPLES))
    for samples in (trained, held_out):
        assert (samples["tokens"][:, :-1] == END).any(), "no sample has two documents: nothing would be tested"
    log = (tmp_path / "logs" / "trained" / "metrics.jsonl").read_text()
    record, validated = map(json.loads, log.splitlines())
    assert {name: record[name] for name in ("cross_entropy", "forward_kl")} == pytest.approx(means(trained), rel=1e-5)
    assert {name: evaluation[name] for name in ("cross_entropy", "forward_kl")} == pytest.approx(
        means(held_out), rel=1e-5
    )
    assert validated["val_cross_entropy"] == pytest.approx(evaluation["cross_entropy"], abs=0.05), "one step later"

    calibration = calibration_set(own_cache(world.blend, tmp_path / "own"), num_samples=NUM_SAMPLES)
    wanted = 1 - each_alone(student, calibration.tokens, cosine_of_first_layer).double().mean().item()
    assert block_importance[0] == pytest.approx(wanted, rel=1e-5)
