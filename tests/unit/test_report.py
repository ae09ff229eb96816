"""The report shows the numbers it was given, loads nothing, and escapes what it shows."""

import dataclasses
import json
import math
import re
import subprocess
import sys

import pytest
import torch

from minitron_nemo.artefacts.atomic import write_text_atomically
from minitron_nemo.artefacts.manifest import manifest_sha256
from minitron_nemo.artefacts.origin import Origin
from minitron_nemo.artefacts.publishing import publishing
from minitron_nemo.errors import UserError
from minitron_nemo.importance.scores import ImportanceScores
from minitron_nemo.pruning.make_plan import make_plan
from minitron_nemo.reporting import plots
from minitron_nemo.reporting.collect import FORMER_NAMES, collect, read_metrics
from minitron_nemo.reporting.table import format_table
from minitron_nemo.reporting.write import write_report
from minitron_nemo.shape.arch import ModelArch
from minitron_nemo.shape.axes import AXES, shrink

TEACHER = ModelArch(
    num_layers=6, hidden_size=64, ffn_hidden_size=160, num_attention_heads=8, num_query_groups=4, kv_channels=8,
    vocab_size=512, seq_length=128,
)  # fmt: skip
NARROW = shrink(TEACHER, hidden_size=48, ffn_hidden_size=96)
SHALLOW = shrink(TEACHER, num_layers=3)
ARCHS = {"teacher": TEACHER, "width_pruned": NARROW, "width_student": NARROW, "depth_pruned": SHALLOW,
         "depth_student": SHALLOW}  # fmt: skip


def make_scores():
    """Importance of the teacher; random, above zero."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.rand(shape, generator=generator, dtype=torch.float64) + 0.01  # noqa: E731
    scores = {"num_layers": draw(6), "hidden_size": draw(64), "ffn_hidden_size": draw(6, 160),
              "num_attention_heads": draw(6, 8)}  # fmt: skip
    return ImportanceScores(
        arch=TEACHER, by_axis=scores, num_samples=16, seq_length=128, sequence_aggregation="mean",
        batch_aggregation="l2",
    )  # fmt: skip


def add_importance(run, scores):
    (run / "importance").mkdir()
    scores.write(run / "importance")


def evaluation(arch, index):
    cross_entropy = 3.0 + index / 7
    return {"params": arch.num_params(), "tokens": 100_000 * index, "cross_entropy": cross_entropy,
            "perplexity": math.exp(cross_entropy), "forward_kl": index / 3, "top1_agreement": 1 - index / 10,
            "arch": arch.to_dict()}  # fmt: skip


def write_evaluation(run, name, values):
    (run / "eval").mkdir(exist_ok=True)
    (run / "eval" / f"{name}.json").write_text(json.dumps({"kind": "evaluation", "fingerprint": "f", **values}))


def add_model(run, name, arch, index, *, plan=None):
    facts = {"arch": arch.to_dict()}
    with publishing(run / f"{name}.nemo", kind="model", origin=Origin("f"), extra=facts) as draft:
        (draft.folder / "model_config.yaml").write_text("{}")
        if plan is not None:
            plan.write(draft.folder / "plan.json")
    write_evaluation(run, name, evaluation(arch, index))


def add_metrics(run, name):
    folder = run / "logs" / name
    folder.mkdir(parents=True)
    records = []
    for step in range(1, 41):
        loss = 3.0 + 4.0 * math.exp(-step / 8)
        record = {"step": step, "cross_entropy": loss, "forward_kl": loss / 2, "consumed_tokens": step * 4096,
                  "tokens_per_second": 2048.0 if step <= 20 else 4096.0}  # fmt: skip
        if step % 10 == 0:
            record |= {"val_cross_entropy": loss + 0.05, "val_forward_kl": loss / 2 + 0.02}
        records.append(json.dumps(record))
    (folder / "metrics.jsonl").write_text("\n".join(records) + "\n")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run as the recipes leave it: five models, two of them trained, importance and two plans."""
    run = tmp_path_factory.mktemp("runs") / "tiny"
    run.mkdir()
    scores = make_scores()
    add_importance(run, scores)
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
    assert list(report["made"]) == list(ARCHS)


def test_page_shows_the_numbers_and_every_section(page):
    for heading in ("Results", "Training", "Importance", "Shapes before and after", "How it was made", "Made with"):
        assert f"<h2>{heading}</h2>" in page
    assert page.count("<svg ") == page.count("</svg>") == 3 + 2 + 4 + len(AXES) + 1  # a picture for each panel
    assert "<td>3.2857</td>" in page
    assert "num_layers 6 -&gt; 3" in page


def test_loss_curves_show_training_and_validation_of_every_trained_model(run):
    curves = {name: read_metrics(run / "logs" / name) for name in ("width_student", "depth_student")}
    both = plots.loss_curves(curves, list(ARCHS))
    assert "Cross-entropy" in both
    assert "Forward KL" in both
    only_validation = {name: [r for r in records if "val_cross_entropy" in r] for name, records in curves.items()}
    assert "Cross-entropy" in plots.loss_curves(only_validation, list(ARCHS))
    correction = [
        {"step": 1, "cross_entropy": 3.0, "consumed_tokens": 10},
        {"step": 2, "cross_entropy": 2.0, "consumed_tokens": 20},
    ]
    assert "Forward KL" not in plots.loss_curves({"teacher": correction}, list(ARCHS))
    assert plots.loss_curves({"teacher": [{"step": 1, "cross_entropy": math.nan}]}, list(ARCHS)) == ""


def test_forward_kl_by_place_is_that_of_the_last_validation():
    def record(step, *values):
        parts = ("0-1", "2-9", "10-11")
        return {"step": step, **{f"val_forward_kl/position_{part}": x for part, x in zip(parts, values, strict=True)}}

    records = [record(1, 9.0, 9.0, 9.0), record(2, 3.0, 1.0, 2.0), {"step": 3, "forward_kl": 1.0}]
    assert plots._by_place(records) == ([0.0, 2.0, 10.0, 12.0], [3.0, 1.0, 2.0])
    drawn = plots.loss_curves({"student": records}, ["student"])
    assert drawn.count("<svg ") == 1
    assert "Forward KL by place in the sample" in drawn


def test_importance_has_a_panel_for_every_scored_axis(run):
    report = collect(run, list(ARCHS))
    drawn = plots.importance(report.scores, report.plans)
    panels = ("Block importance (red: dropped)", "Attention heads", "Feed-forward neurons", "Hidden channels, ranked")
    for title in (*panels, "48 kept"):
        assert title in drawn
    one = dataclasses.replace(report.scores, by_axis={"hidden_size": report.scores["hidden_size"]})
    drawn = plots.importance(one, {})
    assert [title for title in panels if title in drawn] == ["Hidden channels, ranked"]
    assert "kept" not in drawn


def test_plans_of_another_model_cut_nothing_of_this_one(run):
    report = collect(run, list(ARCHS))
    elsewhere = dataclasses.replace(TEACHER, rotary_base=7.0)
    drawn = plots.importance(dataclasses.replace(report.scores, arch=elsewhere), report.plans)
    assert "Block importance" in drawn
    assert "dropped" not in drawn
    assert "kept" not in drawn


def test_shapes_show_every_size_of_every_axis(page):
    text = re.sub(r"<[^>]+>", " ", page[page.index("<h2>Shapes") :])
    for name in ("layers", "hidden", "feed-forward", "query heads", "parameters"):
        assert text.count(f" {name} ") >= 2, name  # in the table and over its bars
    assert re.search(r"<td>width_pruned, width_student</td><td>6</td><td>48</td><td>96</td><td>8</td>", page)


def test_page_loads_nothing(page):
    assert not re.search(r"https?:|//|@import|<script|<link|<img|<iframe|src=", page)
    assert not re.search(r'href="(?!#)', page)
    assert not re.search(r"url\((?!#)", page)


def test_page_takes_its_text_color_in_plots_from_the_reader(page):
    assert "currentColor" in page
    assert "#010203" not in page


def test_page_is_readable_on_a_telephone(page):
    """At 390 pixels: names break between words, tables scroll by themselves, a panel is as wide as the page is."""
    style = page[page.index("<style>") : page.index("</style>")]
    assert "anywhere" not in style
    assert "break-all" not in style
    assert page.count("<table>") == page.count('<div class="scroll"><table>')
    assert 'content="width=device-width, initial-scale=1"' in page
    for box in re.findall(r'<svg [^>]*viewBox="0 0 ([\d.]+) [\d.]+"', page):
        assert float(box) <= 300  # so that 9 points are more than 10 pixels on 358
    sizes = [float(size) for size in re.findall(r'<text style="font-size: ([\d.]+)px', page)]
    assert min(sizes) >= 8
    assert len(sizes) > 50


def test_bars_of_the_loss_start_near_the_least_and_say_so(run):
    near = plots._near_minimum
    assert near([4.0625, 4.1342, 4.9796]) == pytest.approx(3.97)
    assert near([4.1, 4.2]) == pytest.approx(4.09)
    assert near([4.0, 4.0]) == near([3.0]) == near([]) == near([0.0, 1.0]) == 0
    for values in ([2.0, 2.001, 2.002], [0.001, 5.0], [4.0, 400.0]):
        assert 0 <= near(values) < min(values)
    drawn = plots.results(collect(run, list(ARCHS)).models)
    assert re.search(r"cross-entropy, from 2\.\d+", drawn)
    assert "forward KL, from" not in drawn


def test_page_tells_time_throughput_size_command_and_revision(tmp_path):
    origin = Origin("f", command="python recipes/distill.py --config-name 'a b'")
    with publishing(tmp_path / "student.nemo", kind="model", origin=origin) as draft:
        (draft.folder / "weights").write_bytes(b"x" * 2_500_000)
    write_evaluation(tmp_path, "student", evaluation(TEACHER, 1))
    add_metrics(tmp_path, "student")
    made = write_report(tmp_path, ["student"], output=tmp_path / "report.html").made["student"]
    assert (made.steps, made.tokens, made.size) == (40, 40 * 4096, 2_500_000)
    assert made.seconds == pytest.approx(20 * 4096 / 2048 + 20 * 4096 / 4096)
    page = (tmp_path / "report.html").read_text()
    row = "<td>student</td><td>40</td><td>164 K</td><td>1m00s</td><td>2.73 K</td><td>-</td>"
    for said in (
        row,
        "<td>2.5 MB</td>",
        made.git_revision[:12],
        "python recipes/distill.py --config-name &#x27;a b&#x27;",
    ):
        assert said in page
    assert re.fullmatch(r"[0-9a-f]{40}|", made.git_revision)


def test_the_reference_is_named_and_students_are_known_by_what_they_were_made_from(tmp_path):
    """The part a model plays is read off its manifest: its own name says nothing."""
    add_model(tmp_path, "one", TEACHER, 0)
    add_model(tmp_path, "cut", NARROW, 3, plan=make_plan(make_scores(), NARROW))
    random_start = Origin("f", config={"init_method_std": 0.02})
    with publishing(tmp_path / "drawn.nemo", kind="model", origin=random_start) as draft:
        (draft.folder / "model_config.yaml").touch()
    reference = manifest_sha256(tmp_path / "one.nemo")
    for index, (name, start, weight) in enumerate([("a", "cut", 1.0), ("b", "cut", 0.0), ("c", "drawn", 1.0)], start=1):
        parents = {"student": manifest_sha256(tmp_path / f"{start}.nemo"), "teacher": reference}
        origin = Origin("f", {"kl_weight": weight}, parents)
        with publishing(tmp_path / f"{name}.nemo", kind="model", origin=origin) as draft:
            (draft.folder / "model_config.yaml").touch()
        write_evaluation(tmp_path, name, evaluation(NARROW, index))
    for name in ("one", "cut", "a", "b", "c"):
        path = tmp_path / "eval" / f"{name}.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"parents": {"reference": reference}}))
    report = collect(tmp_path, ["one", "cut", "a", "b", "c"])
    assert report.reference == "one"
    assert [report.made[name].part for name in report.models] == [
        "", "", "student", "no teacher", "random start",
    ]  # fmt: skip
    write_report(tmp_path, list(report.models), output=tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert '<p class="verdict">a is compared with the reference one: ' in page
    assert "with that of the reference, one." in page
    assert json.loads((tmp_path / "report.json").read_text())["verdict"].startswith("a is compared with")


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
        ("{", "not a readable evaluation record"),
        ("[]", "evaluation record"),
        ('{"kind": "evaluation", "params": "many"}', "params='many' is not a number"),
        (evaluation(TEACHER, 0), "evaluation record"),
        ({"kind": "evaluation", **evaluation(TEACHER, 0), "cross_entropy": None}, "cross_entropy=None is not a number"),
        ({"kind": "evaluation", **evaluation(TEACHER, 0), "arch": {}}, "arch: field"),
        ({"kind": "evaluation", **evaluation(TEACHER, 0), "arch": None}, "arch: expected a mapping"),
        ({"kind": "evaluation", **evaluation(NARROW, 0)}, "another shape"),
    ],
)
def test_damaged_evaluations_are_refused_by_file_name(tmp_path, content, message):
    add_model(tmp_path, "teacher", TEACHER, 0)
    text = content if isinstance(content, str) else json.dumps(content)
    (tmp_path / "eval" / "teacher.json").write_text(text)
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


def test_files_written_under_former_names_are_read_under_todays(tmp_path):
    lines = ['{"step": 1, "lm_loss": 5, "consumed_tokens": 8}', '{"step": 2, "cross_entropy": 4}',
             '{"step": 2, "val_lm_loss": 6, "val_forward_kl": 1}']  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert read_metrics(tmp_path) == [
        {"step": 1, "cross_entropy": 5, "consumed_tokens": 8},
        {"step": 2, "cross_entropy": 4, "val_cross_entropy": 6, "val_forward_kl": 1},
    ]
    add_model(tmp_path, "teacher", TEACHER, 1)
    former = evaluation(TEACHER, 1)
    former["validation_loss"] = former.pop("cross_entropy")
    write_evaluation(tmp_path, "teacher", former)
    assert collect(tmp_path, ["teacher"]).models["teacher"] == evaluation(TEACHER, 1)


@pytest.mark.parametrize("reverse", [False, True])
def test_todays_name_wins_over_a_former_one_in_the_same_record(tmp_path, reverse):
    pairs = [("lm_loss", 5), ("cross_entropy", 4), ("step", 1)]
    (tmp_path / "metrics.jsonl").write_text(json.dumps(dict(pairs[::-1] if reverse else pairs)) + "\n")
    assert read_metrics(tmp_path) == [{"step": 1, "cross_entropy": 4}]


def test_no_former_name_is_in_use():
    assert not set(FORMER_NAMES) & set(FORMER_NAMES.values())


def test_a_diverged_or_unreferenced_model_is_still_reported(tmp_path):
    add_model(tmp_path, "teacher", TEACHER, 0)
    unknown = {"perplexity": math.inf, "forward_kl": None, "top1_agreement": None}
    write_evaluation(tmp_path, "teacher", evaluation(TEACHER, 0) | unknown)
    report = write_report(tmp_path, ["teacher"], output=tmp_path / "report.html")
    assert json.loads((tmp_path / "report.json").read_text())["models"]["teacher"]["perplexity"] is None
    assert "diverged" in format_table(report.models)


def test_terminal_table_is_aligned():
    models = {name: evaluation(arch, index) for index, (name, arch) in enumerate(ARCHS.items())}
    lines = format_table(models).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert re.split(r" {2,}", lines[0]) == [
        "model", "parameters", "tokens", "cross-entropy", "perplexity", "forward KL", "top-1 agreement",
    ]  # fmt: skip
    assert [line.split()[0] for line in lines[2:]] == list(ARCHS)
    assert "3.2857" in lines[4]


def test_a_second_report_replaces_the_first_and_leaves_no_other_files(tmp_path):
    add_model(tmp_path, "teacher", TEACHER, 0)
    for _ in range(2):
        write_report(tmp_path, ["teacher"], output=tmp_path / "out" / "report.html")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["report.html", "report.json"]


def test_a_failed_write_leaves_the_file_as_it_was_and_no_other(tmp_path):
    write_text_atomically(tmp_path / "a.txt", "before\n")
    with pytest.raises(UnicodeEncodeError):
        write_text_atomically(tmp_path / "a.txt", "half of it \ud800")
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    assert (tmp_path / "a.txt").read_bytes() == b"before\n"
    write_text_atomically(tmp_path / "a.txt", "after \u00fc\n")
    assert (tmp_path / "a.txt").read_bytes() == "after \u00fc\n".encode()
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_matplotlib_waits_until_a_report_is_written():
    script = "import sys, minitron_nemo.reporting.write; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], timeout=120).returncode == 0
