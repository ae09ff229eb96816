"""What a reader of the report sees of a number, and in which order."""

import json

from minitron_nemo.reporting.collect import read_metrics
from minitron_nemo.reporting.table import HEADINGS, format_table, table_row

MODEL = {
    "params": 1_234_567, "tokens": 98_304, "cross_entropy": 4.06251, "perplexity": 58.1234, "forward_kl": 0.0987,
    "top1_agreement": 0.6732,
}  # fmt: skip


def test_every_cell_is_its_number_in_the_form_of_its_heading():
    row = dict(zip(HEADINGS, table_row("student", MODEL), strict=True))
    assert row == {
        "model": "student", "parameters": "1.23 M", "tokens": "98.3 K", "cross-entropy": "4.0625",
        "perplexity": "58.12", "forward KL": "0.0987", "top-1 agreement": "67.3%",
    }  # fmt: skip
    assert "67.3%" in format_table({"student": MODEL})


def test_records_are_in_the_order_of_their_steps_and_not_of_the_file(tmp_path):
    records = [
        {"step": 3, "loss": 3.0},
        {"step": 1, "loss": 1.0},
        {"step": 2, "loss": 2.0},
        {"step": 3, "val_loss": 3.5},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert [record["loss"] for record in read_metrics(tmp_path)] == [1.0, 2.0, 3.0]
    assert read_metrics(tmp_path)[-1]["val_loss"] == 3.5
