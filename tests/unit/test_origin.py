"""What makes an output current: settings, parents and kind, each of them; for folders and for records."""

import pytest

from minitron_nemo.artefacts.origin import Origin
from minitron_nemo.artefacts.records import is_current_record, write_record

MADE = {"kind": "model", "config": {"lr": 1e-3, "steps": 4}, "parents": {"student": "aa", "teacher": "bb"}}
CHANGES = [
    {"kind": "importance"},
    {"config": {"lr": 2e-3, "steps": 4}},
    {"config": {"lr": 1e-3}},
    {"parents": {"student": "aa", "teacher": "cc"}},
    {"parents": {"student": "bb", "teacher": "aa"}},
    {"parents": {"student": "aa"}},
]


def origin(*, kind, config, parents):
    return Origin.of(kind, config, parents=parents)


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_every_part_of_an_origin_is_in_its_fingerprint(change):
    assert origin(**MADE).fingerprint != origin(**{**MADE, **change}).fingerprint


def test_overwriting_is_not():
    allowed = Origin.of("model", MADE["config"], parents=MADE["parents"], overwrite=True)
    assert allowed.fingerprint == origin(**MADE).fingerprint


def test_a_record_is_current_for_the_fingerprint_that_made_it_and_its_kind_alone(tmp_path):
    path = tmp_path / "eval" / "model.json"
    made = origin(**MADE)
    write_record(path, {"cross_entropy": 1.0}, kind="evaluation", origin=made)
    assert is_current_record(path, made.fingerprint, kind="evaluation")
    assert not is_current_record(path, "another", kind="evaluation")
    assert not is_current_record(path, made.fingerprint, kind="report")
    assert not is_current_record(tmp_path / "none.json", made.fingerprint, kind="evaluation")
