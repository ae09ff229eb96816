"""Scores of blocks: what is best, what is written, what is refused; no model runs here."""

import json
from dataclasses import replace

import pytest

from minitron_nemo.config.shapes import DropBy, TargetConfig
from minitron_nemo.errors import UserError
from minitron_nemo.importance.blocks import BlockScores, blocks_of, layer_evaluations, read_blocks
from minitron_nemo.reporting.plots import block_scores
from minitron_nemo.testing import LLAMA

SCORES = BlockScores(
    arch=LLAMA,
    lengths=[1, 2],
    values={
        "cosine": {1: [0.5, 0.2, 0.1, 0.4], 2: [0.7, 0.3, 0.3], 3: [0.5, 0.4], 4: [0.9]},
        "lm_loss": {1: [5.0, 3.5, 3.25, 4.0], 2: [6.0, 4.5, 4.75]},
        "task": {1: [0.5, 0.75, 0.75, 0.25], 2: [0.25, 0.5, 0.25]},
    },
    whole={"lm_loss": 3.0, "task": 0.75},
    facts={"num_samples": 4},
)


def test_blocks_are_every_run_of_layers_and_one_layer_stays():
    assert blocks_of(4, [1, 3]) == [range(n, n + 1) for n in range(4)] + [range(3), range(1, 4)]
    for lengths in ([0], [4], [1, 5]):
        with pytest.raises(UserError, match=r"^score_blocks.lengths=.*1 to 3 of them$"):
            blocks_of(4, lengths)


def test_evaluations_are_a_pass_and_half_of_what_the_cut_models_need():
    for layers, length in ((4, 1), (32, 16), (32, 1), (7, 5)):
        cut_models = (layers - length) * (layers - length + 1)
        assert layer_evaluations(layers, [length]) == layers + cut_models / 2
        assert layer_evaluations(layers, [length]) == layers + sum(layers - b.stop for b in blocks_of(layers, [length]))
    assert layer_evaluations(32, [1, 16]) == 32 + 496 + 136


def test_the_best_is_the_lowest_loss_and_the_highest_accuracy_and_of_equal_ones_the_lower_layers_stay():
    assert SCORES.best_block("lm_loss", 2) == [2, 3]
    assert SCORES.best_block("cosine", 2) == [3, 4]
    assert SCORES.best_block("task", 1) == [3]
    assert SCORES.best_layers("task", 2) == [2, 3]
    assert SCORES.best_layers("lm_loss", 3) == [2, 3, 4]
    assert SCORES.best()["lm_loss"] == {"1": [3, 3], "2": [2, 3]}


def test_what_was_not_scored_is_refused_with_what_to_do():
    with pytest.raises(UserError, match=r"^no nmse in it, only cosine, lm_loss, task; run score_blocks again with it$"):
        SCORES.best_block("nmse", 1)
    with pytest.raises(UserError, match=r"has blocks of 1, 2 layers and 3 must go.*score_blocks.lengths=\[3\]$"):
        SCORES.best_block("lm_loss", 3)
    with pytest.raises(UserError, match="score that one"):
        SCORES.check_source(replace(LLAMA, hidden_size=64), name="blocks")


def test_the_folder_is_read_as_it_was_written_and_the_table_shows_the_best(tmp_path):
    SCORES.write(tmp_path)
    assert read_blocks(tmp_path) == replace(SCORES, facts={})
    assert json.loads((tmp_path / "blocks.json").read_text())["num_samples"] == 4
    table = SCORES.table()
    assert "| 2-3 | 0.3 | **4.5** | **0.5** |" in table
    assert "| 3 | **0.1** | **3.25** | **0.75** |" in table
    assert "| none | 0 | 3 | 0.75 |" in table
    assert SCORES.describe()[3].startswith("lm_loss: of blocks of 2, layers 2-3 cost least: 4.5 (whole model 3)")


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        (("schema_version",), 2, "schema_version=2"),
        (("values", "lm_loss", "1"), [1.0, 2.0], "2 blocks of 1 layers; a model of 4 has 4"),
        (("values", "lm_loss", "1"), [1.0, 2.0, 3.0, "x"], "'x' is no number"),
        (("values", "lm_loss", "1"), [1.0, 2.0, 3.0, float("nan")], "NaN is no number"),
        (("values", "lm_loss", "9"), [], "0 blocks of 9 layers"),
        (("values", "lm_loss"), [], "lm_loss must be an object"),
        (("values", "perplexity"), {"1": [1.0] * 4}, "perplexity: no measure of blocks"),
        (("values",), 3, "values must be an object"),
        (("lengths",), 3, "lengths must be a list"),
        (("lengths",), ["two"], "'two' is no whole number"),
        (("arch", "hidden_size"), -1, "hidden_size"),
    ],
)
def test_a_damaged_file_is_refused_by_name(path, value, says, tmp_path):
    SCORES.write(tmp_path)
    record = json.loads((tmp_path / "blocks.json").read_text())
    inner = record
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    (tmp_path / "blocks.json").write_text(json.dumps(record))
    with pytest.raises(UserError) as caught:
        read_blocks(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path}/blocks.json: ")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_plot_is_a_file_of_its_own_with_a_panel_for_each_length_and_measure():
    from xml.etree import ElementTree

    text = block_scores(SCORES)
    root = ElementTree.fromstring(text)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert root.attrib["width"]
    assert len([e for e in root.iter() if e.get("id", "").startswith("axes_")]) == 2 * 3
    assert "first of 2 layers left out (best: 2)" in text
    assert "layer left out (best: 3)" in text


def test_the_target_says_how_the_layers_are_chosen_once():
    assert TargetConfig(num_layers=2, drop_by=DropBy.task).shrink(LLAMA).num_layers == 2
    for target in (
        TargetConfig(drop_by=DropBy.task),
        TargetConfig(drop_layers=[2], drop_by=DropBy.cosine, num_layers=3),
    ):
        with pytest.raises(UserError, match=r"^prune.target.drop_by=\w+: needs num_layers"):
            target.shrink(LLAMA)
