"""The public face is what docs/api.md says it is, and its example runs."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from random_scores import random_scores

import minitron_nemo
from minitron_nemo.shape.arch import ModelArch
from minitron_nemo.testing import random_nemo

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "api.md").read_text()
TEACHER = ModelArch(2, 128, 384, 4, 2, 32, 131, 64)


def python(code, cwd):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True,
                          timeout=120)  # fmt: skip


def test_the_example_of_the_page_runs_and_makes_the_student(tmp_path):
    random_nemo(tmp_path / "teacher.nemo", TEACHER)
    (tmp_path / "importance").mkdir()
    random_scores(TEACHER).write(tmp_path / "importance")
    (example,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(example.splitlines()) <= 11
    result = python(example, tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [
        "hidden_size 128 -> 96; ffn_hidden_size 384 -> 256",
        "embedding.word_embeddings.weight (131, 96) torch.float32",
    ]
    student = minitron_nemo.open_nemo(tmp_path / "student.nemo", verify=True)
    assert student.arch == minitron_nemo.shrink(TEACHER, hidden_size=96, ffn_hidden_size=256)
    assert student.manifest.parents == {"model": minitron_nemo.open_nemo(tmp_path / "teacher.nemo").sha256}
    teacher, plan = minitron_nemo.open_nemo(tmp_path / "teacher.nemo"), student.path / "plan.json"
    with pytest.raises(minitron_nemo.UserError, match="exists already"):
        minitron_nemo.prune(teacher, minitron_nemo.read_plan(plan), student.path)


def test_the_page_lists_the_face_and_every_name_is_there():
    rows = re.findall(r"^\| (`.*?) \|", PAGE, re.MULTILINE)
    listed = {name for row in rows for name in re.findall(r"`(\w+)", row)}
    assert listed == set(minitron_nemo.__all__) == set(minitron_nemo._PUBLIC)
    for name in set(minitron_nemo.__all__) - {"MinitronGPT"}:  # which brings NeMo along; `nemo_checks.py` looks at it
        assert getattr(minitron_nemo, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'distil'"):
        _ = minitron_nemo.distil


def test_importing_the_package_brings_nothing_heavy(tmp_path):
    heavy = ("torch", "hydra", "megatron", "nemo")
    result = python(f"import sys, minitron_nemo; print([m for m in {heavy} if m in sys.modules])", tmp_path)
    assert result.stdout == "[]\n", result.stderr
