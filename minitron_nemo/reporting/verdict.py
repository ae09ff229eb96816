"""The result of a run in a few sentences: which student is closest to the reference, at what price, against what."""

import math
from collections.abc import Mapping
from typing import Any

from minitron_nemo.reporting.making import STUDENT, WITHOUT_PRUNING, WITHOUT_TEACHER, Making

# What a baseline is, and what has brought nothing where a student does not beat it.
BASELINES = {
    WITHOUT_TEACHER: ("trained without a teacher", "the teacher"),
    WITHOUT_PRUNING: ("distilled from random weights", "the pruned weights"),
}
# (metric, 1 where less is better and -1 where more is, how it is written)
MEASURES = (("forward_kl", 1, "forward KL {:.4f}"), ("top1_agreement", -1, "top-1 agreement {:.1%}"),
            ("cross_entropy", 1, "cross-entropy {:.4f}"))  # fmt: skip

Models = Mapping[str, Mapping[str, Any]]


def verdict(models: Models, made: Mapping[str, Making], *, reference: str) -> str:
    """Plain sentences; empty without a trained student whose distance from a reference is known."""
    measured = {name: values for name, values in models.items() if _is_measured(values)}
    students = [name for name in measured if made[name].part == STUDENT]
    if not students:
        return ""
    best = min(students, key=lambda name: measured[name]["forward_kl"])
    whose = f"the reference {reference}" if reference else "the reference"
    which = f"Of {len(students)} students, {best} is the closest to" if students[1:] else f"{best} is compared with"
    kl, agreement = (form.format(measured[best][key]) for key, _, form in MEASURES[:2])
    sentences = [f"{which} {whose}: {kl}, {agreement}."]
    agreeing = max(students, key=lambda name: measured[name]["top1_agreement"])
    if measured[agreeing]["top1_agreement"] > measured[best]["top1_agreement"]:
        sentences.append(f"By agreement it is {agreeing} with {measured[agreeing]['top1_agreement']:.1%}.")
    sentences.append(_price(models, best, reference))
    baselines = [name for name in measured if made[name].part in BASELINES]
    sentences += [_beside(measured, best, name, made[name].part) for name in baselines]
    if not baselines:
        sentences.append("There is no baseline to say what pruning or the teacher brought.")
    return " ".join(sentence for sentence in sentences if sentence)


def _price(models: Models, best: str, reference: str) -> str:
    """What the student costs in cross-entropy, for the parameters that are left."""
    if reference not in models:
        return ""
    ours, theirs = models[best], models[reference]
    difference = ours["cross_entropy"] - theirs["cross_entropy"]
    words = f"{abs(difference):.4f} {'more' if difference >= 0 else 'less'}"
    share = ours["params"] / theirs["params"]
    return f"It has {share:.0%} of the reference's parameters and {words} cross-entropy ({ours['cross_entropy']:.4f})."


def _beside(models: Models, best: str, baseline: str, part: str) -> str:
    """The student beside one baseline: where it is better and where it is not."""
    what, credit = BASELINES[part]
    better: list[str] = []
    worse: list[str] = []
    for key, sign, form in MEASURES:
        is_better = sign * models[best][key] < sign * models[baseline][key]
        (better if is_better else worse).append(form.format(models[baseline][key]))
    said = f"The baseline {baseline}, {what}, "
    if not worse:
        return f"{said}is behind it in everything: {', '.join(better)}."
    verdict_on = f"so {credit} brought nothing there"
    if not better:
        return f"{said}is at least as good in everything: {', '.join(worse)}; {verdict_on}."
    return f"{said}is behind it in {', '.join(better)}, but at least as good in {', '.join(worse)}, {verdict_on}."


def _is_measured(values: Mapping[str, Any]) -> bool:
    return all(values.get(key) is not None and math.isfinite(values[key]) for key, _, _ in MEASURES)
