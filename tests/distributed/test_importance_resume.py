"""An estimate that was stopped or killed goes on from the samples it has, to the sums of one that never was."""

import pytest
import torch

from minitron_nemo.checkpoint.formats.nemo import open_nemo
from minitron_nemo.data.calibration import CalibrationSet
from minitron_nemo.distributed import stopping
from minitron_nemo.distributed.layout import Layout
from minitron_nemo.engine.model import BuildOptions
from minitron_nemo.errors import StoppedError
from minitron_nemo.steps import estimate as step
from minitron_nemo.steps.estimate import Estimate
from minitron_nemo.steps.kept_sums import KeptSums
from minitron_nemo.testing import LLAMA, random_batch, random_nemo, run_layout

SAMPLES, SEQ = 16, 8
HOW = Estimate(micro_batch_size=2, save_every_n_samples=3)


class PowerCutError(Exception):
    """What ends a run at the begin of a stretch, before any rank hears of it."""


def run(groups, path, folder, fingerprint, *, cut_in=None, asked_in=None):
    """(sums or why there are none, forward passes of this rank) of a run that may be cut or asked to stop in a call."""
    calls, forward, stretches = [], step.forward_hidden, step.stretches

    def counted(model, batches):
        calls.append(len(batches))
        if asked_in is not None and groups.rank == groups.layout.world_size - 1 and len(calls) == asked_in:
            stopping._requests.stop()
        return forward(model, batches)

    def until_the_cut(*arguments, **options):
        for number, stretch in enumerate(stretches(*arguments, **options), start=1):
            if number == cut_in:
                raise PowerCutError
            yield stretch

    tokens = random_batch(LLAMA, samples=SAMPLES, seq_length=SEQ, seed=2)["tokens"]
    kept = KeptSums(folder, fingerprint) if fingerprint else None
    step.forward_hidden, step.stretches = counted, until_the_cut
    try:
        source, options = open_nemo(path).weights, BuildOptions(groups=groups)
        found = step.estimate(source, CalibrationSet(tokens, "x"), HOW, options=options, kept=kept)
    except (PowerCutError, StoppedError) as ended:
        groups.barrier()
        return f"{type(ended).__name__}: {ended}", len(calls)
    finally:
        step.forward_hidden, step.stretches = forward, stretches
        stopping._requests.asked = False
    return found.sums, len(calls)


def equal(ours, theirs):
    assert [(part.first, part.end) for part in ours.parts] == [(part.first, part.end) for part in theirs.parts]
    pairs = zip(ours.parts, theirs.parts, strict=True)
    return all(
        torch.equal(a, b)
        for mine, other in pairs
        for axis in mine.tables
        for a, b in zip(mine.tables[axis], other.tables[axis], strict=True)
    )


def all_ways(groups, path, folder):
    """What became of runs that ended in every way, and how many forward passes the last one of each took."""
    whole, all_calls = run(groups, path, folder, "")
    found = {"whole": [[part.first, part.end] for part in whole.parts], "calls": all_calls}
    for name, ended in (("cut", {"cut_in": 6}), ("asked", {"asked_in": 2})):
        fingerprint = name * 20
        why, _ = run(groups, path, folder, fingerprint, **ended)
        kept = [entry.name for entry in sorted((folder / fingerprint[:16]).iterdir())]
        again, calls = run(groups, path, folder, fingerprint)
        found[name] = (why, kept, equal(again, whole), calls)
    # Sums that are damaged, and those of another estimate that lie in the same place.
    (newest,) = [entry for entry in (folder / ("cut" * 20)[:16]).iterdir() if entry.name.startswith("samples_")]
    groups.barrier()
    if groups.is_main:
        file = newest / "sums.safetensors"
        file.write_bytes(file.read_bytes()[:-8] + b"damaged!")
    groups.barrier()
    sums, calls = run(groups, path, folder, "cut" * 20)
    found["damaged"] = (equal(sums, whole), calls)
    groups.barrier()
    sums, calls = run(groups, path, folder, ("asked" * 20)[:16] + "another")
    found["another"] = (equal(sums, whole), calls)
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    return run_layout(all_ways, Layout(dp=2), random_nemo(folder / "m.nemo", LLAMA).path, folder / "kept")


def test_every_sample_is_heard_though_neither_micro_batches_nor_ranks_divide_the_stretches(found):
    assert found["whole"] == [[0, 2], [2, 4], [4, 8], [8, 16]]


def test_a_run_that_was_killed_goes_on_from_its_newest_sums_bit_for_bit(found):
    why, kept, same, calls = found["cut"]
    assert why == "PowerCutError: "
    assert len(kept) == 1
    assert kept[0].startswith("samples_000000")
    assert same
    assert 0 < calls < found["calls"], "the samples before are not heard again"


def test_a_run_that_is_asked_to_stop_ends_with_what_it_has_and_goes_on(found):
    why, kept, same, calls = found["asked"]
    assert why == "StoppedError: importance after 6 of 16 samples, saved as asked"
    assert kept == ["samples_00000006"]
    assert same
    assert 0 < calls < found["calls"]


def test_damaged_sums_and_those_of_another_estimate_are_begun_anew(found):
    assert found["damaged"] == found["another"] == (True, found["calls"])
