"""The report shows the numbers it was given, loads nothing, and escapes what it shows."""

import json
import math
import re

import pytest
import torch

from minitron_nemo import report_plots
from minitron_nemo.arch import ModelArch
from minitron_nemo.checkpoint.manifest import publishing
from minitron_nemo.errors import UserError
from minitron_nemo.importance.scores import ImportanceScores
from minitron_nemo.pruning.plan import make_plan
from minitron_nemo.report import format_table, read_metrics, write_report

TEACHER = ModelArch(
    num_layers=6, hidden_size=64, ffn_hidden_size=160, num_attention_heads=8, num_query_groups=4, kv_channels=8,
    vocab_size=512, seq_length=128,
)  # fmt: skip
NARROW = TEACHER.shrink(hidden_size=48, ffn_hidden_size=96)
SHALLOW = TEACHER.shrink(num_layers=3)
ARCHS = {"teacher": TEACHER, "width_pruned": NARROW, "width_student": NARROW, "depth_pruned": SHALLOW,
         "depth_student": SHALLOW}  # fmt: skip


def evaluation(arch, index):
    loss = 3.0 + index / 7
    return {"params": arch.num_params(), "tokens": 100_000 * index, "validation_loss": loss,
            "perplexity": math.exp(loss), "forward_kl": index / 3, "top1_agreement": 1 - index / 10,
            "arch": arch.to_dict()}  # fmt: skip


def add_model(run, name, arch, index, *, plan=None):
    with publishing(run / f"{name}.nemo", kind="model", fingerprint="f", config={}, parents={},
                    extra={"arch": arch.to_dict()}) as folder:  # fmt: skip
        if plan is not None:
            plan.write(folder / "plan.json")
    (run / "eval").mkdir(exist_ok=True)
    (run / "eval" / f"{name}.json").write_text(json.dumps(evaluation(arch, index)))


def add_metrics(run, name):
    folder = run / "logs" / name
    folder.mkdir(parents=True)
    records = []
    for step in range(1, 41):
        loss = 3.0 + 4.0 * math.exp(-step / 8)
        record = {"step": step, "lm_loss": loss, "forward_kl": loss / 2, "consumed_tokens": step * 4096}
        if step % 10 == 0:
            record |= {"val_lm_loss": loss + 0.05, "val_forward_kl": loss / 2 + 0.02}
        records.append(json.dumps(record))
    (folder / "metrics.jsonl").write_text("\n".join(records) + "\n")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run as the recipes leave it: five models, two of them trained, importance and two plans."""
    run = tmp_path_factory.mktemp("runs") / "tiny"
    run.mkdir()
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.rand(shape, generator=generator, dtype=torch.float64) + 0.01  # noqa: E731
    scores = ImportanceScores(
        arch=TEACHER, num_layers=draw(6), hidden_size=draw(64), ffn_hidden_size=draw(6, 160),
        num_attention_heads=draw(6, 8), num_samples=16, seq_length=128, sequence_aggregation="mean",
        batch_aggregation="l2",
    )  # fmt: skip
    (run / "importance").mkdir()
    scores.write(run / "importance")
    for index, (name, arch) in enumerate(ARCHS.items()):
        plan = make_plan(scores, arch) if name.endswith("pruned") else None
        add_model(run, name, arch, index, plan=plan)
    add_metrics(run, "width_student")
    add_metrics(run, "depth_student")
    return run


@pytest.fixture(scope="module")
def page(run):
    write_report(run, list(ARCHS), output=run / "report.html")
    return (run / "report.html").read_text()


def test_json_has_the_numbers_of_the_evaluations_in_order(run, page):
    report = json.loads((run / "report.json").read_text())
    assert list(report["models"]) == list(ARCHS)
    for index, (name, arch) in enumerate(ARCHS.items()):
        assert report["models"][name] == evaluation(arch, index)
    assert set(report["facts"]) == {"date", "machine", "versions"}


def test_page_shows_the_numbers_and_every_section(page):
    for heading in ("Results", "Training", "Importance", "Shapes before and after", "Made with"):
        assert f"<h2>{heading}</h2>" in page
    assert page.count("<svg ") == page.count("</svg>") == 4
    assert "<td>3.2857</td>" in page
    assert "num_layers 6 -&gt; 3" in page


def test_loss_curves_show_training_and_validation_of_every_trained_model(run):
    curves = {name: read_metrics(run / "logs" / name) for name in ("width_student", "depth_student")}
    both = report_plots.loss_curves(curves, list(ARCHS))
    assert "Language-model loss" in both
    assert "Forward KL" in both
    only_validation = {name: [r for r in records if "val_lm_loss" in r] for name, records in curves.items()}
    assert "Language-model loss" in report_plots.loss_curves(only_validation, list(ARCHS))
    correction = [
        {"step": 1, "lm_loss": 3.0, "consumed_tokens": 10},
        {"step": 2, "lm_loss": 2.0, "consumed_tokens": 20},
    ]
    assert "Forward KL" not in report_plots.loss_curves({"teacher": correction}, list(ARCHS))
    assert report_plots.loss_curves({"teacher": [{"step": 1, "lm_loss": math.nan}]}, list(ARCHS)) == ""


def test_page_loads_nothing(page):
    assert not re.search(r"https?:|//|@import|<script|<link|<img|<iframe|src=", page)
    assert not re.search(r'href="(?!#)', page)
    assert not re.search(r"url\((?!#)", page)


def test_page_takes_its_text_color_in_plots_from_the_reader(page):
    assert "currentColor" in page
    assert "#010203" not in page


def test_names_are_escaped_everywhere(tmp_path):
    name = "<script>alert(1)<script>$x_{"
    run = tmp_path / "<b>run<b>"
    run.mkdir()
    add_model(run, name, TEACHER, 1)
    add_metrics(run, name)
    write_report(run, [name], output=run / "report.html")
    page = (run / "report.html").read_text()
    assert "<script" not in page
    assert "<b>" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert list(json.loads((run / "report.json").read_text())["models"]) == [name]


def test_metrics_importance_and_plans_may_be_absent(tmp_path):
    add_model(tmp_path, "teacher", TEACHER, 0)
    write_report(tmp_path, ["teacher"], output=tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "<h2>Results</h2>" in page
    assert "<h2>Training</h2>" not in page
    assert "<h2>Importance</h2>" not in page


def test_missing_pieces_are_refused_by_file_name(tmp_path):
    with pytest.raises(UserError, match=r"teacher\.nemo"):
        write_report(tmp_path, ["teacher"], output=tmp_path / "report.html")
    add_model(tmp_path, "teacher", TEACHER, 0)
    (tmp_path / "eval" / "teacher.json").unlink()
    with pytest.raises(UserError, match=r"eval/teacher\.json: no evaluation") as caught:
        write_report(tmp_path, ["teacher"], output=tmp_path / "report.html")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ("[]", "expected an object"),
        ('{"params": "many"}', "params='many' is not a number"),
        (json.dumps({**evaluation(TEACHER, 0), "arch": {}}), "arch: field"),
        (json.dumps({**evaluation(TEACHER, 0), "arch": None}), "arch: expected a mapping"),
        (json.dumps(evaluation(NARROW, 0)), "another shape"),
    ],
)
def test_damaged_evaluations_are_refused_by_file_name(tmp_path, content, message):
    add_model(tmp_path, "teacher", TEACHER, 0)
    (tmp_path / "eval" / "teacher.json").write_text(content)
    with pytest.raises(UserError, match=rf"eval/teacher\.json.*{re.escape(message)}"):
        write_report(tmp_path, ["teacher"], output=tmp_path / "report.html")


def test_no_models_and_wrong_suffix_are_refused(tmp_path):
    with pytest.raises(UserError, match="report.models"):
        write_report(tmp_path, [], output=tmp_path / "report.html")
    with pytest.raises(UserError, match="report.output"):
        write_report(tmp_path, ["teacher"], output=tmp_path / "report.json")


def test_metrics_of_a_resumed_run_are_merged_by_step(tmp_path):
    lines = ['{"step": 1, "loss": 5}', '{"step": 2, "loss": 4}', '{"step": 2, "loss": 3}', '{"step": 2, "val_loss": 6}',
             '{"step": 3, "lo']  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 5}, {"step": 2, "loss": 3, "val_loss": 6}]
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl: line 1"):
        read_metrics(tmp_path)


def test_a_diverged_or_unreferenced_model_is_still_reported(tmp_path):
    add_model(tmp_path, "teacher", TEACHER, 0)
    values = {**evaluation(TEACHER, 0), "perplexity": math.inf, "forward_kl": None, "top1_agreement": None}
    (tmp_path / "eval" / "teacher.json").write_text(json.dumps(values))
    models = write_report(tmp_path, ["teacher"], output=tmp_path / "report.html")
    assert json.loads((tmp_path / "report.json").read_text())["models"]["teacher"]["perplexity"] is None
    assert "diverged" in format_table(models)


def test_terminal_table_is_aligned():
    models = {name: evaluation(arch, index) for index, (name, arch) in enumerate(ARCHS.items())}
    lines = format_table(models).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[0].split()[0] == "model"
    assert [line.split()[0] for line in lines[2:]] == list(ARCHS)
    assert "3.2857" in lines[4]


def test_a_second_report_replaces_the_first_and_leaves_no_other_files(tmp_path):
    add_model(tmp_path, "teacher", TEACHER, 0)
    for _ in range(2):
        write_report(tmp_path, ["teacher"], output=tmp_path / "out" / "report.html")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["report.html", "report.json"]
