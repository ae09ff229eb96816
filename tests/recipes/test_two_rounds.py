"""Two rounds of cutting and distilling in one command, and artefacts that name every ancestor up to the first."""

import json
import re
import shutil

import pytest
import torch
from bpe import save_bpe
from hf_models import save_tiny_hf
from tiny_run import SENTENCE

from minitron_nemo.artefacts.lineage import ancestors
from minitron_nemo.artefacts.manifest import MANIFEST_FILE, manifest_sha256, read_manifest
from minitron_nemo.artefacts.origin import Origin
from minitron_nemo.artefacts.publishing import publishing
from minitron_nemo.checkpoint.formats.nemo import open_nemo
from minitron_nemo.config.compose import CONF_DIR
from minitron_nemo.errors import UserError
from minitron_nemo.pruning.plan import read_plan
from minitron_nemo.steps.prune import prune
from minitron_nemo.testing import TINY, random_nemo
from recipes.pipeline import main as run_pipeline

# The files of conf/ with smaller numbers in them; the configs themselves are those of conf/.
SMALLER = {
    "model/nemotron4_15b.yaml": {"num_layers": 2, "hidden_size": 48, "ffn_hidden_size": 96, "num_attention_heads": 12,
                                 "num_query_groups": 2, "kv_channels": 8, "vocab_size": 400, "seq_length": 64},
    "model/minitron_8b.yaml": {"hidden_size": 32, "ffn_hidden_size": 64},
    "round/nemotron4_8b.yaml": {"hidden_size": 32, "ffn_hidden_size": 64},
    "round/nemotron4_4b.yaml": {"hidden_size": 24, "ffn_hidden_size": 48, "num_attention_heads": 6},
}  # fmt: skip
OVERRIDES = [
    "trainer.accelerator=cpu", "trainer.devices=1", "parallel.tensor_model_parallel_size=1",
    "parallel.sequence_parallel=false", "data.seq_length=16", "data.split='80,20,0'", "prepare_data.workers=1",
    "estimate_importance.num_samples=4", "distill.training.max_steps=2", "distill.training.global_batch_size=2",
    "distill.check_teacher=false",  # whose weights are random
    "distill.training.val_check_interval=0", "distill.training.save_every_n_steps=0", "evaluate.num_samples=4",
]  # fmt: skip


def write_smaller(folder):
    for name, sizes in SMALLER.items():
        text = (CONF_DIR / name).read_text()
        for key, size in sizes.items():
            text, found = re.subn(rf"(?m)^( *{key}): \d+", rf"\g<1>: {size}", text)
            assert found == 1, f"{name}: {key}"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


@pytest.fixture(scope="module")
def rounds(tmp_path_factory):
    """The folder that the command was run in."""
    folder = tmp_path_factory.mktemp("rounds")
    write_smaller(folder / "conf")
    shutil.copy(CONF_DIR / "nemotron4_4b.yaml", folder / "conf")
    (folder / "data" / "text").mkdir(parents=True)
    for number in range(10):
        (folder / "data" / "text" / f"{number}.txt").write_text(f"{SENTENCE} {number} " * 8)
    save_tiny_hf(folder / "models" / "nemotron-4-15b", "nemotron", hidden_size=48, intermediate_size=96,
                 vocab_size=400, num_attention_heads=12, num_key_value_heads=2,
                 head_dim=8, tokenizer=False)  # fmt: skip
    save_bpe(folder / "models" / "nemotron-4-15b", "byte_level", size=400)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert run_pipeline(["--config-name", "nemotron4_4b", "--config-dir", "conf", *OVERRIDES]) == 0
    return folder / "runs"


def test_one_command_makes_both_rounds(rounds):
    sizes = {}
    for name in ("nemotron4_8b/teacher", "nemotron4_8b/student", "nemotron4_4b/pruned", "nemotron4_4b/student"):
        arch = open_nemo(rounds / f"{name}.nemo", verify=True).arch
        sizes[name] = (arch.hidden_size, arch.ffn_hidden_size, arch.num_attention_heads)
    assert list(sizes.values()) == [(48, 96, 12), (32, 64, 12), (24, 48, 6), (24, 48, 6)]
    assert (rounds / "nemotron4_4b" / "student_hf" / "config.json").is_file()
    first, second = (json.loads((rounds / name / "eval" / "student.json").read_text()) for name in
                     ("nemotron4_8b", "nemotron4_4b"))  # fmt: skip
    teacher = manifest_sha256(rounds / "nemotron4_8b" / "teacher.nemo")
    assert first["parents"]["reference"] == second["parents"]["reference"] == teacher
    assert read_manifest(rounds / "nemotron4_4b" / "student.nemo", kind="model").parents["teacher"] == teacher


def test_the_last_model_names_every_ancestor_and_its_hash(rounds):
    lineage = read_manifest(rounds / "nemotron4_4b" / "student.nemo", kind="model").extra["lineage"]
    told = [(entry["generation"], entry["role"], entry["name"], entry["kind"]) for entry in lineage]
    assert told == [
        (1, "student", "pruned.nemo", "model"),
        (1, "teacher", "teacher.nemo", "model"),
        (2, "model", "student.nemo", "model"),
        (2, "importance", "importance", "importance"),
        (3, "student", "pruned.nemo", "model"),
        (4, "importance", "importance", "importance"),
    ]
    folders = {"8b": rounds / "nemotron4_8b", "4b": rounds / "nemotron4_4b"}
    there = {manifest_sha256(path.parent) for folder in folders.values() for path in folder.glob(f"*/{MANIFEST_FILE}")}
    assert {entry["sha256"] for entry in lineage} <= there
    assert lineage[-2]["sha256"] == manifest_sha256(folders["8b"] / "pruned.nemo")
    assert "lineage" not in read_manifest(folders["8b"] / "teacher.nemo", kind="model").extra, "the first has none"


def test_the_plans_of_both_rounds_make_one(rounds, tmp_path):
    """Cut twice without training in between is cut once by the plans put together."""
    teacher = open_nemo(rounds / "nemotron4_8b" / "teacher.nemo")
    first, second = (
        read_plan(rounds / name / "pruned.nemo" / "plan.json") for name in ("nemotron4_8b", "nemotron4_4b")
    )
    twice = prune(prune(teacher, first, tmp_path / "first.nemo"), second, tmp_path / "twice.nemo")
    once = prune(teacher, first.then(second), tmp_path / "once.nemo")
    assert once.arch == twice.arch
    assert all(torch.equal(once.weights.read(name), twice.weights.read(name)) for name in once.weights.names())
    told = [(entry["generation"], entry["name"]) for entry in twice.manifest.extra["lineage"]]
    assert told == [(1, "first.nemo"), (2, "teacher.nemo")]


def test_ancestors_of_an_artefact_older_than_lineages_are_known_by_their_hashes(tmp_path):
    with publishing(tmp_path / "old", kind="model", origin=Origin("f", parents={"teacher": "ab"})) as draft:
        (draft.folder / "x").write_text("x")
    assert ancestors({"model": tmp_path / "old"}) == [
        {"generation": 1, "role": "model", "name": "old", "kind": "model", "sha256": manifest_sha256(tmp_path / "old")},
        {"generation": 2, "role": "teacher", "name": "", "kind": "", "sha256": "ab"},
    ]


@pytest.mark.parametrize("lineage", [3, [3], [{}], [{"generation": "1"}]])
def test_a_lineage_that_is_none_is_refused(lineage, tmp_path):
    path = random_nemo(tmp_path / "model.nemo", TINY["llama"]).path / MANIFEST_FILE
    values = json.loads(path.read_text())
    values["extra"]["lineage"] = lineage
    path.write_text(json.dumps(values))
    with pytest.raises(UserError, match="lineage must"):
        ancestors({"model": path.parent})
