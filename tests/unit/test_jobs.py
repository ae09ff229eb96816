"""What is said before a job starts: an output never where an input is, a target that opens nowhere."""

import dataclasses

import pytest

from minitron_nemo.artefacts.origin import Origin
from minitron_nemo.artefacts.publishing import publishing
from minitron_nemo.checkpoint.formats.hf_config import export_doubt
from minitron_nemo.errors import UserError
from minitron_nemo.steps.step import Job
from minitron_nemo.testing import TINY


def artefact(path, kind="model"):
    with publishing(path, kind=kind, origin=Origin("f")) as draft:
        (draft.folder / "weights").write_bytes(b"years of work")
    return path


@pytest.fixture
def job(tmp_path):
    """A job that reads a teacher and may replace whatever is at its output."""
    parents = {"teacher": artefact(tmp_path / "teacher.nemo")}
    return Job(tmp_path / "student.nemo", "model", {}, parents, overwrite=True)


@pytest.mark.parametrize("overwrite", [True, False])
@pytest.mark.parametrize("is_record", [True, False])
@pytest.mark.parametrize(
    ("output", "relation"),
    [("teacher.nemo", "is"), ("x/../teacher.nemo", "is"), ("link", "is"), ("teacher.nemo/student", "lies inside"),
     (".", "contains"), ("link/deep/student", "lies inside")],
)  # fmt: skip
def test_an_output_that_would_touch_an_input_model_is_refused(job, tmp_path, output, relation, overwrite, is_record):
    (tmp_path / "link").symlink_to(tmp_path / "teacher.nemo")
    moved = dataclasses.replace(job, output=tmp_path / output, overwrite=overwrite, is_record=is_record)
    with pytest.raises(UserError, match=f"output .* {relation} .*teacher.nemo, which this step reads") as caught:
        moved.check_output()
    assert "\n" not in str(caught.value)


def test_an_output_beside_its_inputs_is_allowed_whatever_its_name_begins_with(job, tmp_path):
    job.check_output()
    dataclasses.replace(job, output=tmp_path / "teacher.nemo2").check_output()


def test_an_output_may_lie_in_a_folder_of_text_but_not_replace_it(tmp_path):
    texts = tmp_path / "texts"
    texts.mkdir()
    job = Job(texts / "run" / "data", "data", {}, inputs=(texts,), overwrite=True)
    job.check_output()
    for output in (texts, tmp_path):
        with pytest.raises(UserError, match="which this step reads"):
            dataclasses.replace(job, output=output).check_output()


def test_an_artefact_of_another_kind_is_never_replaced(job, tmp_path):
    artefact(tmp_path / "data", kind="data")
    with pytest.raises(UserError, match="data is a data artefact, never overwritten by a model"):
        dataclasses.replace(job, output=tmp_path / "data").check_output()
    artefact(tmp_path / "student.nemo")
    job.check_output()


@pytest.mark.parametrize(
    ("hidden", "heads", "family", "choose"),
    [
        (44, 8, "llama", "choose hidden_size=40 or hidden_size=48"),
        (47, 8, "llama", "choose hidden_size=40 or hidden_size=48"),
        (49, 8, "llama", "choose hidden_size=48"),
        (4, 8, "llama", "choose hidden_size=8"),
        (40, 8, "llama", None),
        (44, 8, "mistral", None),
    ],
)
def test_a_hidden_size_that_transformers_refuses_comes_with_the_nearest_that_it_takes(hidden, heads, family, choose):
    """Of those that the source has."""
    arch = dataclasses.replace(TINY["llama"], hidden_size=hidden, num_attention_heads=heads, family=family)
    doubt = export_doubt(arch, largest=50)
    assert (doubt is None) == (choose is None)
    assert choose is None or doubt.endswith(choose)
