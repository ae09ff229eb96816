"""What a training run says to the person who watches it."""

import contextlib
import logging
from types import SimpleNamespace

import pytest

from minitron_nemo import progress
from minitron_nemo.config.schema import OptimConfig, TrainingConfig
from minitron_nemo.distributed.groups import Groups
from minitron_nemo.training import loop
from minitron_nemo.training.metrics import in_words
from minitron_nemo.training.state import Position

LOSSES = {"loss": 0.068, "cross_entropy": 4.13, "forward_kl": 0.068, "top1_agreement": 0.824}


def messages_of(tmp_path, monkeypatch, caplog, *, groups=None, done=0, **training) -> list[str]:
    """The lines of a run of which every step is a second long and none computes anything."""
    caplog.set_level(logging.INFO, logger="minitron_nemo")
    now = [0.0]
    monkeypatch.setitem(progress._Lines.__init__.__kwdefaults__, "clock", lambda: now[0])

    def step(run, state, objective, batches):
        now[0] += 1.0
        state.position.advance(samples=2, tokens=16)
        return {**LOSSES, "learning_rate": 1e-4, "grad_norm": 1.0, "consumed_tokens": state.position.consumed_tokens}

    monkeypatch.setattr(loop, "train_step", step)
    monkeypatch.setattr(loop, "validate", lambda run, state, objective: dict(LOSSES))
    checkpoints = SimpleNamespace(
        locked=contextlib.nullcontext,
        check_space=lambda saves: None,
        resume=lambda state: state.position.advance(samples=0, tokens=0) if done else None,
        save=lambda state: None,
    )
    run = loop.TrainingRun(
        name="student",
        config=TrainingConfig(global_batch_size=2, **training),
        groups=groups or Groups(),
        checkpoints=checkpoints,
        logs=tmp_path,
        train_batch=lambda first, count: {},
        valid_batch=None,
        seq_length=8,
        flops_per_token=1.0,
    )
    loop.train(run, SimpleNamespace(position=Position()), objective=None)
    return caplog.messages


def test_every_validation_is_a_line_of_its_own(tmp_path, monkeypatch, caplog):
    said = messages_of(tmp_path, monkeypatch, caplog, max_steps=10, val_check_interval=4)
    validations = [line for line in said if "validation" in line]
    words = "validation cross-entropy 4.1300, forward KL 0.0680, top-1 agreement 82.4%"
    assert validations == [f"student: step {step}: {words}" for step in (4, 8, 10)]


def test_a_line_has_the_step_the_rate_the_time_left_and_the_loss(tmp_path, monkeypatch, caplog):
    said = messages_of(tmp_path, monkeypatch, caplog, max_steps=10, val_check_interval=0)
    assert "student step 5/10 50% 16 tokens/s 5s left loss 0.068" in said
    assert said[-1] == "student step 10/10 100% 16 tokens/s 10s total loss 0.068"


def test_a_resumed_run_counts_its_steps_from_where_it_was(tmp_path, monkeypatch, caplog):
    said = messages_of(tmp_path, monkeypatch, caplog, max_steps=10, val_check_interval=0, done=1)
    assert "student step 6/10 60% 16 tokens/s 4s left loss 0.068" in said


def test_a_warm_up_that_does_not_fit_is_told_with_the_figure(tmp_path, monkeypatch, caplog):
    optim = OptimConfig(warmup_steps=40)
    said = messages_of(tmp_path, monkeypatch, caplog, max_steps=20, val_check_interval=0, optim=optim)
    assert said[0] == "student: optim.warmup_steps=40 is cut to 19: the run has 20 steps"


def test_a_warm_up_that_fits_and_other_ranks_say_nothing(tmp_path, monkeypatch, caplog):
    fits = OptimConfig(warmup_steps=19)
    assert "warmup" not in str(
        messages_of(tmp_path, monkeypatch, caplog, max_steps=20, val_check_interval=0, optim=fits)
    )
    caplog.clear()
    cut = OptimConfig(warmup_steps=40)
    other = Groups(rank=1)
    assert not messages_of(tmp_path, monkeypatch, caplog, max_steps=2, val_check_interval=0, optim=cut, groups=other)


def test_the_schedule_warms_up_for_as_long_as_is_said():
    from minitron_nemo.engine.optimizer import build_schedule

    optimizer = SimpleNamespace(param_groups=[{"params": [], "lr": 0.0, "weight_decay": 0.0}])
    optim = OptimConfig(lr=1.0, min_lr=0.0, warmup_steps=40)
    schedule = build_schedule(optimizer, optim, max_steps=20)
    rates = []
    for _ in range(20):
        rates.append(optimizer.param_groups[0]["lr"])
        schedule.step(increment=1)
    assert rates[:19] == pytest.approx([n / 19 for n in range(1, 20)])
    assert rates[19] < 0.01


def test_a_metric_without_words_goes_by_its_name():
    assert in_words({"loss": 1.0, "hidden_state_loss": 0.25}) == "hidden state loss 0.25"


def test_what_is_of_some_tokens_alone_makes_no_line_longer():
    assert in_words({**LOSSES, "forward_kl/source_code": 1.0, "forward_kl/position_0-7": 2.0}) == in_words(LOSSES)
