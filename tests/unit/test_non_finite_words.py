"""What a step that is not finite is said to come from."""

import json
import math

import pytest
import torch

from minitron_nemo.data.sample_ids import SampleId
from minitron_nemo.distributed.groups import Groups
from minitron_nemo.training.non_finite import find

GOOD = {"tokens": 8.0, "loss": 1.0, "cross_entropy": 2.0, "forward_kl": 1.0, "teacher_entropy": 3.0}
STUDENT = {"loss": math.nan, "cross_entropy": math.inf, "forward_kl": math.nan}
TEACHER = {"loss": math.nan, "teacher_entropy": math.nan, "forward_kl": math.nan}


def ids(numbers):
    return [SampleId(number, "code", (number, number + 1)) for number in numbers]


def found(*micro_batches):
    sums = [
        {name: torch.tensor(value, dtype=torch.float64) for name, value in {**GOOD, **bad}.items()}
        for bad in micro_batches
    ]
    samples = [range(2 * number, 2 * number + 2) for number in range(len(sums))]
    return find(12, sums, samples=samples, groups=Groups(), ids=ids)


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (STUDENT, "the student is not finite in 2 samples"),
        (TEACHER, "the teacher is not finite in 2 samples"),
        (STUDENT | TEACHER, "the student and the teacher are not finite in 2 samples"),
        ({"loss": math.inf, "forward_kl": math.inf}, "the loss is not finite in 2 samples"),
        ({"tokens": math.nan, **STUDENT}, "the loss mask is not finite in 2 samples"),
        (TEACHER | {"forward_kl/teacher_expert": math.nan, "forward_kl/source_code": math.nan},
         "the teacher expert is not finite in 2 samples"),
        ({}, "the gradient is not finite"),
    ],
)  # fmt: skip
def test_it_is_said_which_model_it_was(bad, said):
    assert str(found({}, bad)).startswith(f"step 12: {said}")


def test_samples_of_bad_micro_batches_are_named_and_no_others(tmp_path):
    what = found({}, TEACHER, {}, TEACHER)
    assert [sample.number for sample in what.samples] == [2, 3, 6, 7]
    assert str(what).endswith("in 4 samples: " + ", ".join(
        f"sample {n} of code (documents {n}, {n + 1})" for n in (2, 3, 6, 7)
    ))  # fmt: skip
    written = json.loads(what.write(tmp_path).read_text())
    assert written["found_in"] == ["teacher"]
    assert written["sums"] == ["forward_kl", "loss", "teacher_entropy"]
    assert written["samples"][0] == {"number": 2, "source": "code", "documents": [2, 3]}
    assert [path.name for path in tmp_path.iterdir()] == ["non_finite_step_00000012.json"]


def test_a_message_stays_short():
    many = str(found(*[TEACHER] * 300))
    assert "in 600 samples" in many
    assert len(many) < 400


def test_what_no_micro_batch_has_is_found_in_the_sums_of_the_step():
    """Hidden states are summed up on every stage, over all micro-batches."""
    fine = {name: torch.tensor(value, dtype=torch.float64) for name, value in GOOD.items()}
    total = {**GOOD, "mlp_outputs_cosine": math.nan, "loss": math.nan}
    said = find(3, [fine], samples=[range(2)], groups=Groups(), ids=ids, total=total)
    assert (said.sums, said.samples) == (["loss", "mlp_outputs_cosine"], [])
    assert str(said) == "step 3: the loss is not finite"
