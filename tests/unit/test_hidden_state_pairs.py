"""Which layer of the teacher each layer of the student is compared with, and what is refused before anything starts."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch

from minitron_nemo.artefacts.contents import contents_of
from minitron_nemo.config.compose import compose
from minitron_nemo.config.hidden_states import HiddenStateDivergence, HiddenStateKind
from minitron_nemo.config.schema import identity as identity_of
from minitron_nemo.distributed.groups import Groups
from minitron_nemo.errors import UserError
from minitron_nemo.losses.hidden_state import COSINE, MSE
from minitron_nemo.pruning.plan import identity
from minitron_nemo.shape.arch import ModelArch
from minitron_nemo.shape.taps import KINDS
from minitron_nemo.steps.hidden_states import hidden_state_pairs, hidden_states_of
from minitron_nemo.steps.options import head_loss
from minitron_nemo.testing import LLAMA
from minitron_nemo.training.objectives import DistillationObjective

TEACHER = dataclasses.replace(LLAMA, num_layers=6)
STUDENT = dataclasses.replace(LLAMA, num_layers=3, hidden_size=32)
DEEPER = dataclasses.replace(LLAMA, num_layers=8)


def folder(path, arch: ModelArch, *, kept=None, source=TEACHER):
    """A model folder as far as pairs need one, with a plan that kept these layers of the source."""
    path.mkdir()
    if kept is not None:
        values = json.loads(identity(arch).to_json())
        values["source"] = {**arch.to_dict(), "num_layers": source.num_layers}
        values["keep"]["num_layers"] = kept
        (path / "plan.json").write_text(json.dumps(values))
    return SimpleNamespace(path=path, contents=contents_of(path), arch=arch)


def pairs(student, teacher, *overrides: str) -> list[tuple[str, int, int]]:
    """(kind, student layer, teacher layer), counted from 0."""
    given = [f"distill.hidden_states.{text}" for text in overrides]
    found = hidden_state_pairs(compose("llama31_width", given), student, teacher)
    assert all(pair.student.kind == pair.teacher.kind for pair in found)
    return [(pair.student.kind, pair.student.layer, pair.teacher.layer) for pair in found]


def test_nothing_is_compared_by_default(tmp_path):
    assert pairs(folder(tmp_path / "s", STUDENT), folder(tmp_path / "t", TEACHER)) == []


def test_the_plan_says_which_layer_of_the_teacher_each_was(tmp_path):
    student, teacher = folder(tmp_path / "s", STUDENT, kept=[0, 3, 5]), folder(tmp_path / "t", TEACHER)
    found = pairs(student, teacher, "kinds=[embeddings,mlp_outputs]")
    assert found == [("embeddings", 0, 0), *(("mlp_outputs", s, t) for s, t in ((0, 0), (1, 3), (2, 5)))]
    assert pairs(student, teacher, "kinds=[layer_outputs]", "student_layers=[2]") == [("layer_outputs", 1, 3)]


def test_without_a_plan_equally_deep_models_are_compared_layer_by_layer(tmp_path):
    narrower = dataclasses.replace(TEACHER, hidden_size=32)
    found = pairs(folder(tmp_path / "s", narrower), folder(tmp_path / "t", TEACHER), "kinds=[attention_outputs]")
    assert found == [("attention_outputs", layer, layer) for layer in range(6)]


def test_layers_that_are_given_need_no_plan(tmp_path):
    found = pairs(
        folder(tmp_path / "s", STUDENT), folder(tmp_path / "t", TEACHER),
        "kinds=[layer_outputs]", "student_layers=[3,1]", "teacher_layers=[5,5]",
    )  # fmt: skip
    assert found == [("layer_outputs", 0, 4), ("layer_outputs", 2, 4)]


@pytest.mark.parametrize("kept", [None, [0, 3, 5]], ids=["no plan", "of another teacher"])
def test_a_student_whose_layers_nobody_knows_is_refused(kept, tmp_path):
    student, teacher = folder(tmp_path / "s", STUDENT, kept=kept), folder(tmp_path / "t", DEEPER)
    with pytest.raises(UserError, match=r"3 layers, the teacher .* 8, .* give .*student_layers and teacher_layers"):
        pairs(student, teacher, "kinds=[layer_outputs]")
    assert pairs(student, teacher, "kinds=[embeddings]") == [("embeddings", 0, 0)], "that needs no layers"


@pytest.mark.parametrize(("role", "layers"), [("student", "[1,4]"), ("teacher", "[7,1]")])
def test_layers_that_a_model_has_not_are_refused(role, layers, tmp_path):
    given = {"student": "[1,2]", "teacher": "[1,2]"} | {role: layers}
    with pytest.raises(UserError, match=rf"hidden_states.{role}_layers=.*: the {role} .* has \d layers"):
        pairs(
            folder(tmp_path / "s", STUDENT), folder(tmp_path / "t", TEACHER),
            "kinds=[layer_outputs]", *(f"{name}_layers={value}" for name, value in given.items()),
        )  # fmt: skip


REFUSED = {
    "kinds=[embeddings,embeddings]": "kinds=.*each at most once",
    "kinds=[layer_outputs] student_layers=[2,2]": "student_layers=.*each at most once",
    "kinds=[layer_outputs] student_layers=[2] teacher_layers=[1,2]": "teacher_layers=.*one for each",
    "kinds=[layer_outputs] teacher_layers=[1]": "teacher_layers=.*one for each",
    "kinds=[embeddings] student_layers=[1]": "compares no layers",
    "student_layers=[1]": "compares no layers",
    "kinds=[layer_outputs] student_layers=[0]": "student_layers=.*at least 1",
    "kinds=[layer_outputs] weight=0": "weight=0.*above 0",
    "kinds=[logits]": "kinds",
}


@pytest.mark.parametrize("settings", REFUSED)
def test_settings_that_do_not_go_together_are_refused(settings):
    with pytest.raises(UserError, match=REFUSED[settings]):
        compose("llama31_width", [f"distill.hidden_states.{text}" for text in settings.split()])


def test_outputs_of_runs_without_them_stay_current():
    """No fingerprint holds the section while it says nothing."""
    assert "hidden_states" not in identity_of(compose("llama31_depth").distill)
    chosen = compose("llama31_depth", ["distill.hidden_states.kinds=[embeddings]"]).distill
    assert identity_of(chosen)["hidden_states"] == {"kinds": ["embeddings"]}


def test_the_settings_name_the_kinds_that_there_are():
    assert tuple(kind.value for kind in HiddenStateKind) == KINDS
    assert tuple(kind.value for kind in HiddenStateDivergence) == (COSINE, MSE)


def test_the_automatic_weight_needs_a_loss_on_logits():
    overrides = ["distill.kl_weight=0", "distill.cross_entropy_weight=1", "distill.hidden_states.kinds=[embeddings]"]
    with pytest.raises(UserError, match="hidden_states.weight=null: .*kl_weight=0"):
        compose("llama31_width", overrides)
    compose("llama31_width", [*overrides, "distill.hidden_states.weight=0.5"])


def test_a_run_says_in_words_what_it_compares_so_that_no_other_goes_on_from_it(tmp_path):
    student, teacher = folder(tmp_path / "s", STUDENT, kept=[0, 3, 5]), folder(tmp_path / "t", TEACHER)
    frozen = SimpleNamespace(groups=Groups(), arch=TEACHER)
    words = []
    for settings in (
        "kinds=[]", "kinds=[layer_outputs]", "kinds=[mlp_outputs]", "kinds=[layer_outputs] divergence=mse",
        "kinds=[layer_outputs] weight=0.5", "kinds=[layer_outputs] weight=2",
        "kinds=[layer_outputs] student_layers=[2]", "kinds=[layer_outputs] student_layers=[2] teacher_layers=[5]",
    ):  # fmt: skip
        config = compose("llama31_width", [f"distill.hidden_states.{text}" for text in settings.split()])
        head = head_loss(config.distill, student.arch, Groups())
        hidden = hidden_states_of(config, student, teacher, head=head, groups=Groups())
        words.append(DistillationObjective(head, frozen, hidden_states=hidden).in_words)
    assert len(set(words)) == len(words), words
    assert words[-1].endswith(" + automatic weight x layer_outputs_cosine (teacher:student 5:2)")


def test_the_map_is_drawn_by_the_seed_and_only_where_widths_differ(tmp_path):
    teacher = folder(tmp_path / "t", TEACHER)
    maps = {}
    for name, arch, seed in (("a", STUDENT, 1), ("b", STUDENT, 1), ("c", STUDENT, 2), ("as wide", TEACHER, 1)):
        config = compose("llama31_width", [f"seed={seed}", "distill.hidden_states.kinds=[embeddings]"])
        head = head_loss(config.distill, arch, Groups())
        student = folder(tmp_path / name, arch)
        maps[name] = hidden_states_of(config, student, teacher, head=head, groups=Groups()).map
    assert maps["as wide"] is None
    assert maps["a"].weight_GH.shape == (TEACHER.hidden_size, STUDENT.hidden_size)
    assert torch.equal(maps["a"].weight_GH, maps["b"].weight_GH)
    assert not torch.equal(maps["a"].weight_GH, maps["c"].weight_GH)
    assert maps["a"].weight_GH.var().item() == pytest.approx(1 / STUDENT.hidden_size, rel=0.15)
