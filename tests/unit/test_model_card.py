"""An export has what a page on the hub needs, filled from its lineage; foreign words in it are words, not markup."""

import dataclasses
import json
import os

import pytest
import torch
import yaml
from hf_models import save_tiny_hf
from random_scores import random_scores

from minitron_nemo.artefacts.contents import contents_of
from minitron_nemo.artefacts.lineage import ancestors
from minitron_nemo.artefacts.manifest import manifest_sha256
from minitron_nemo.artefacts.origin import Origin
from minitron_nemo.artefacts.records import write_record
from minitron_nemo.artefacts.upstream import LICENCE_LIMIT, Upstream, read_upstream, upstream_of
from minitron_nemo.checkpoint.formats import hf
from minitron_nemo.checkpoint.formats.nemo import open_nemo, write_nemo
from minitron_nemo.checkpoint.source import stream
from minitron_nemo.data.prune_tokenizer import WITHOUT_IDS
from minitron_nemo.errors import UserError
from minitron_nemo.pruning.make_plan import make_plan
from minitron_nemo.pruning.plan import PruningPlan
from minitron_nemo.reporting.licences import LICENCES, OF_NAMES, licence_of
from minitron_nemo.reporting.model_card import HubPage, Wishes, hub_page
from minitron_nemo.shape.arch import ModelArch
from minitron_nemo.shape.axes import shrink
from minitron_nemo.steps.prune import prune
from minitron_nemo.testing import LLAMA, random_nemo

KEPT = {
    "LICENSE": b"the licence\n", "NOTICE": b"of the source\n", "USE_POLICY.md": b"what not to do\n",
    "chat_template.jinja": b"{{ messages }}", "generation_config.json": b'{"eos_token_id": [2, 5], "top_p": 0.9}',
}  # fmt: skip
HOSTILE = "x\n---\nlicense: mit\n| a | <script>alert(1)</script> [b](c) `d` & \u202e"
BAD = ("<script", "\u202e", " [b]", "`d`", "| a |", "\nx\n")
LLAMA31 = Wishes(base_model="meta-llama/Llama-3.1-8B")


def small_plan(arch: ModelArch) -> PruningPlan:
    return make_plan(random_scores(arch), shrink(arch, num_layers=1, hidden_size=24))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder: `teacher.nemo`, imported with all that its page had, `pruned.nemo`, and `student.nemo`."""
    folder = tmp_path_factory.mktemp("run")
    source = save_tiny_hf(folder / "snapshot", "llama", num_key_value_heads=2)
    (source / "README.md").write_text("---\nlicense: 'llama3.1'\n---\n# Llama\n")
    for name, content in KEPT.items():
        (source / name).write_bytes(content)
    opened = hf.open_hf(source)
    origin = Origin.of("model", {"made": "teacher"})
    hf.import_hf(opened, folder / "teacher.nemo", tensors=stream(opened.weights), origin=origin,
                 given="meta-llama/Llama-3.1-8B")  # fmt: skip
    pruned = prune(open_nemo(folder / "teacher.nemo"), small_plan(opened.arch), folder / "pruned.nemo", proof=False)
    parents = {"student": pruned.path, "teacher": folder / "teacher.nemo"}
    origin = Origin.of("model", {"made": "student"}, parents={}, lineage=ancestors(parents))
    write_nemo(folder / "student.nemo", pruned.arch, stream(pruned.weights), dtype=torch.float32,
               tokenizer=pruned.tokenizer, origin=origin)  # fmt: skip
    return folder


def page_of(folder, name="student", called="student", wishes=None) -> HubPage:
    model = open_nemo(folder / f"{name}.nemo")
    return hub_page(model.path, model.tokenizer, called=called, wishes=wishes or Wishes())


def header(page: HubPage) -> dict:
    return yaml.safe_load(page.files["README.md"].decode().split("---\n")[1])


def test_the_card_says_what_was_made_from_what_and_the_notice_what_the_licence_asks(run):
    page = page_of(run)
    assert header(page) == {
        "library_name": "transformers", "pipeline_tag": "text-generation",
        "tags": ["minitron", "pruning", "distillation"], "base_model": "meta-llama/Llama-3.1-8B", "license": "llama3.1",
    }  # fmt: skip
    text = page.files["README.md"].decode()
    plan = small_plan(open_nemo(run / "teacher.nemo").arch)
    assert "\n# Llama-student\n\nBuilt with Llama\n" in text
    assert f"| hidden | {plan.source.hidden_size} | {plan.target.hidden_size} |" in text
    assert "| teacher | teacher |" in text
    assert "| pruned | student |" in text
    assert f"hidden\\_size {plan.source.hidden_size} -&gt; {plan.target.hidden_size}" in text
    assert "LICENSE, NOTICE, USE\\_POLICY.md" in text
    notice = page.files["NOTICE"].decode()
    assert notice.startswith("of the source\n\nLlama 3.1 is licensed under the Llama 3.1 Community License, Copyright")
    assert page.notes == []


def test_packed_models_have_the_same_page(run, tmp_path):
    def pack(name, **more):
        model = open_nemo(run / f"{name}.nemo")
        write_nemo(tmp_path / f"{name}.nemo", model.arch, stream(model.weights), dtype=torch.float32,
                   tokenizer=model.tokenizer, packed=True, **more)  # fmt: skip

    pack("pruned", origin=Origin("p"), files={"plan.json": small_plan(LLAMA).to_json().encode()})
    pack("student", origin=Origin("s", lineage=ancestors({"student": tmp_path / "pruned.nemo"})))
    (tmp_path / "broken.nemo").write_bytes(b"no tar")
    assert (tmp_path / "student.nemo").is_file()
    page = page_of(tmp_path)
    assert header(page)["license"] == "llama3.1"
    assert "hidden\\_size 48 -&gt; 24" in page.files["README.md"].decode(), "read off the packed model beside it"
    assert page.files["NOTICE"].startswith(b"of the source\n\nLlama 3.1")


def test_an_export_carries_what_came_with_the_source_and_opens_with_its_page(run, tmp_path):
    from transformers import GenerationConfig

    model = open_nemo(run / "student.nemo")
    hf.export_hf(model, tmp_path / "out", origin=Origin("e"), files=page_of(run).files)
    for name, content in KEPT.items():
        if name != "NOTICE":
            assert (tmp_path / "out" / name).read_bytes() == content, name
    assert not {"hf_config.json", "upstream.json"} & {path.name for path in (tmp_path / "out").iterdir()}
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == [2, 5]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert not {"transformers_version", "_name_or_path"} & config.keys()


def test_a_source_without_a_generation_config_gets_one_of_the_ids_of_its_config(tmp_path):
    source = save_tiny_hf(tmp_path / "in", "llama", eos_token_id=[2, 7])
    (source / "generation_config.json").unlink()
    opened = hf.open_hf(source)
    hf.import_hf(opened, tmp_path / "x.nemo", tensors=stream(opened.weights), origin=Origin("f"))
    hf.export_hf(open_nemo(tmp_path / "x.nemo"), tmp_path / "out", origin=Origin("e"))
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert written == {"bos_token_id": 1, "eos_token_id": [2, 7]}


def test_scores_are_those_of_this_very_model(run, tmp_path):
    values = {"cross_entropy": 2.5, "perplexity": 12.18, "forward_kl": None, "top1_agreement": 0.751}
    record = run / "eval" / "student.json"
    for sha, shown in ((manifest_sha256(run / "student.nemo"), True), ("0" * 64, False)):
        write_record(record, values, kind="evaluation", origin=Origin("e", parents={"model": sha}, overwrite=True))
        text = page_of(run).files["README.md"].decode()
        assert ("| cross-entropy | 2.5000 |" in text) is shown
        assert ("| top-1 agreement with the reference | 75.1% |" in text) is shown
        assert "forward KL" not in text
    with pytest.raises(UserError, match="evaluates another model than"):
        page_of(run, wishes=Wishes(evaluation=record))
    record.write_text("{")
    assert "## Scores" not in page_of(run).files["README.md"].decode(), "a record that nobody asked for stops no export"
    record.unlink()


def test_foreign_words_are_neither_yaml_nor_markup(run, tmp_path):
    path = tmp_path / "student.nemo"
    model = open_nemo(run / "student.nemo")
    entry = {"generation": 1, "role": HOSTILE, "name": HOSTILE, "kind": "model", "sha256": "0" * 64}
    write_nemo(path, model.arch, stream(model.weights), dtype=torch.float32, tokenizer=model.tokenizer,
               origin=Origin("h", lineage=[entry]))  # fmt: skip
    page = page_of(tmp_path, wishes=Wishes(name=HOSTILE, base_model="a/b", licence="x-1.0"))
    text = page.files["README.md"].decode()
    assert text.count("\n---\n") == 1, "the end of the header"
    assert header(page)["base_model"] == "a/b"
    assert (header(page)["license"], header(page)["license_name"]) == ("other", "x-1.0")
    assert [bad for bad in BAD if bad in text] == []
    assert "x --- license\\: mit \\| a \\| &lt;script&gt;" in text


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("---\nlicense: apache-2.0\ntags: [x]\n---\n", "apache-2.0"),
        ('---\r\nlicense: "llama3.2"\r\n---\r\n', "llama3.2"),
        ("---\nlicense: other\nlicense_name: qwen-research\nlicense_link: LICENSE\n---\n", "qwen-research"),
        ("---\nlicense: other\n---\n", None),
        ("---\nlicense: [a, b]\n---\n", None),
        ("---\nlicense: !!python/object:os.system x\n---\n", None),
        ("---\nlicense: " + "x" * 65 + "\n---\n", None),
        ("---\ntags: x\n---\nlicense: mit\n", None),
        ("license: mit\n", None),
        ("---\nlicense: mit\n" + "#" * 2**16 + "\n---\n", None),
    ],
)
def test_of_a_card_only_the_name_of_its_licence_is_read(card, licence, tmp_path):
    (tmp_path / "README.md").write_bytes(card.encode())
    assert upstream_of(tmp_path, given=str(tmp_path)) == Upstream(None, licence)


def test_the_hub_name_is_the_one_asked_for_or_that_of_the_cache(tmp_path):
    snapshot = tmp_path / "models--Qwen--Qwen2.5-7B" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    assert upstream_of(snapshot, given=str(snapshot)).name == "Qwen/Qwen2.5-7B"
    assert upstream_of(snapshot, given="a/b").name == "a/b"
    assert upstream_of(tmp_path, given=str(tmp_path)).name is None


@pytest.mark.parametrize(
    "values",
    [{"name": "no owner"}, {"name": 1}, {"name": "a/b\n"}, {"licence": "<b>"}, {"licence": ["mit"]},
     {"name": "../../x"}],
)  # fmt: skip
def test_what_an_import_wrote_down_is_taken_by_its_form(values, tmp_path):
    (tmp_path / "upstream.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=f"upstream.json: {next(iter(values))}=.*not the form"):
        read_upstream(contents_of(tmp_path))


@pytest.mark.parametrize("harm", ["large", "link", "pipe"])
def test_a_licence_file_that_is_no_small_regular_file_is_refused(harm, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    if harm == "large":
        (folder / "LICENSE").write_bytes(b"x" * (LICENCE_LIMIT + 1))
    elif harm == "link":
        (tmp_path / "secret").write_text("s")
        (folder / "LICENSE").symlink_to(tmp_path / "secret")
    else:
        os.mkfifo(folder / "LICENSE")
    with pytest.raises(UserError, match="LICENSE"):
        hf.source_files(folder)


def test_licence_files_do_not_decide_whether_an_import_is_current(tmp_path):
    for name in ("config.json", "LICENSE"):
        (tmp_path / name).write_text("{}")
    assert set(hf.source_files(tmp_path)) == {"config.json"}
    assert {"LICENSE", "NOTICE", "upstream.json"} <= set(WITHOUT_IDS), "fewer words, the same licence"


def test_what_each_licence_asks_is_done(run):
    for identifier, licence in LICENCES.items():
        page = page_of(run, wishes=Wishes(licence=identifier))
        text = page.files["README.md"].decode()
        assert (header(page)["license"] == "other") is licence.is_other
        assert header(page).get("license_name") == (identifier if licence.is_other else None)
        for words in (licence.shown, licence.notice, licence.limits):
            assert words is None or words in text
        assert licence.notice is None or licence.notice in page.files["NOTICE"].decode()
        assert text.split("\n# ")[1].startswith((licence.prefix or "student").replace(" ", "-"))


def test_the_name_that_is_wished_for_stays_and_what_is_wrong_with_it_is_said(run):
    page = page_of(run, wishes=dataclasses.replace(LLAMA31, name="Nomad"))
    assert "\n# Nomad\n" in page.files["README.md"].decode()
    assert page.notes == ["export_hf.model_name=Nomad: the licence asks for one that begins with Llama"]


def test_licences_are_known_by_name_where_no_page_was_read_and_else_not_guessed(tmp_path):
    names = {"Qwen/Qwen2.5-7B": "apache-2.0", "Qwen/Qwen2.5-3B-Instruct": "qwen-research", "Qwen/Qwen2.5-72B": "qwen",
             "meta-llama/Llama-3.2-1B": "llama3.2", "mistralai/Mistral-Nemo-Base-2407": "apache-2.0",
             "nvidia/Minitron-8B-Base": "nvidia-open-model-license", "somebody/Llama-3.1-8B": None}  # fmt: skip
    assert {name: licence_of(Upstream(name)) for name in names} == names
    assert licence_of(Upstream("Qwen/Qwen2.5-7B", "mit")) == "mit"
    assert {licence for _, licence in OF_NAMES} <= LICENCES.keys()
    model = random_nemo(tmp_path / "plain.nemo", LLAMA)
    page = hub_page(model.path, model.tokenizer, called="plain", wishes=Wishes())
    assert "license" not in header(page)
    assert "NOTICE" not in page.files
    assert page.notes == [
        "the licence of the model that it comes from is not known: the card needs it (export_hf.license)"
    ]
