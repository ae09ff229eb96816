"""The verdict says what the numbers say, also when a baseline wins."""

import math

from minitron_nemo.reporting.making import OTHER, STUDENT, WITHOUT_PRUNING, WITHOUT_TEACHER, Making
from minitron_nemo.reporting.verdict import verdict


def model(kl, agreement, cross_entropy, params=600):
    return {"params": params, "forward_kl": kl, "top1_agreement": agreement, "cross_entropy": cross_entropy}


def making(part):
    return Making(part=part, size=1, created="", command="", git_revision="")


MODELS = {
    "big": model(0.0, 1.0, 4.0, params=1000),
    "wide": model(0.07, 0.82, 4.1),
    "deep": model(0.12, 0.75, 4.2),
    "plain": model(0.2, 0.67, 4.15),
    "chance": model(0.8, 0.5, 4.9),
}
MADE = {name: making(part) for name, part in zip(
    MODELS, (OTHER, STUDENT, STUDENT, WITHOUT_TEACHER, WITHOUT_PRUNING), strict=True)}  # fmt: skip


def test_the_closest_student_its_price_and_every_baseline():
    assert verdict(MODELS, MADE, reference="big") == (
        "Of 2 students, wide is the closest to the reference big: forward KL 0.0700, top-1 agreement 82.0%. "
        "It has 60% of the reference's parameters and 0.1000 more cross-entropy (4.1000). "
        "The baseline plain, trained without a teacher, is behind it in everything: forward KL 0.2000, "
        "top-1 agreement 67.0%, cross-entropy 4.1500. "
        "The baseline chance, distilled from random weights, is behind it in everything: forward KL 0.8000, "
        "top-1 agreement 50.0%, cross-entropy 4.9000."
    )


def test_a_baseline_that_wins_is_said_to():
    wins_one = MODELS | {"plain": model(0.2, 0.67, 4.05)}
    said = verdict(wins_one, MADE, reference="big")
    assert (
        "plain, trained without a teacher, is behind it in forward KL 0.2000, top-1 agreement 67.0%, but at least as "
        "good in cross-entropy 4.0500, so the teacher brought nothing there."
    ) in said
    wins_all = MODELS | {"chance": model(0.07, 0.9, 4.05)}
    said = verdict(wins_all, MADE, reference="big")
    assert "chance, distilled from random weights, is at least as good in everything" in said
    assert "so the pruned weights brought nothing there." in said


def test_another_student_that_agrees_more_is_named():
    said = verdict(MODELS | {"deep": model(0.12, 0.9, 4.2)}, MADE, reference="big")
    assert "wide is the closest" in said
    assert "By agreement it is deep with 90.0%." in said


def test_one_student_without_baselines_and_a_reference_elsewhere():
    said = verdict({"wide": MODELS["wide"]}, MADE, reference="a model of another run (0123)")
    assert said == (
        "wide is compared with the reference a model of another run (0123): forward KL 0.0700, top-1 agreement 82.0%. "
        "There is no baseline to say what pruning or the teacher brought."
    )


def test_nothing_is_said_where_nothing_is_known():
    assert verdict({"big": MODELS["big"]}, MADE, reference="big") == ""
    assert verdict({"wide": model(None, None, 4.1)}, MADE, reference="") == ""
    assert verdict({"wide": model(math.inf, 0.1, 4.1)}, MADE, reference="") == ""


def test_a_student_with_less_cross_entropy_than_the_reference():
    said = verdict(MODELS | {"wide": model(0.07, 0.82, 3.9)}, MADE, reference="big")
    assert "0.1000 less cross-entropy (3.9000)" in said
