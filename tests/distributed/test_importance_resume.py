"""An estimate that was stopped or killed goes on from the samples it has, to the sums of one that never was."""

import numpy as np
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
from minitron_nemo.testing import LAYOUTS, LLAMA, random_batch, random_nemo, run_layout

SAMPLES, SEQ = 16, 8
HOW = Estimate(micro_batch_size=2, save_every_n_samples=3, second_moments=True)


class PowerCutError(Exception):
    """What ends a run at the begin of a stretch, before any rank hears of it."""


def run(groups, path, folder, fingerprint, *, cut_in=None, asked_in=None):
    """What was heard or why nothing was, and forward passes of this rank, of a run that may be cut or asked to stop.

    What was heard are the sums, and by name the second moments in float64.
    """
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
    return (found.sums, dict(found.second_moments(torch.float64))), len(calls)


def equal(ours, theirs):
    """Sums and second moments, bit for bit."""
    (ours, ours_64), (theirs, theirs_64) = ours, theirs
    assert ours_64.keys() == theirs_64.keys()
    if not all(torch.equal(values, theirs_64[name]) for name, values in ours_64.items()):
        return False
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
    found = {"whole": [[part.first, part.end] for part in whole[0].parts], "calls": all_calls}
    found["moments"] = as_arrays(whole[1])
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
    anew, calls = run(groups, path, folder, "cut" * 20)
    found["damaged"] = (equal(anew, whole), calls)
    groups.barrier()
    anew, calls = run(groups, path, folder, ("asked" * 20)[:16] + "another")
    found["another"] = (equal(anew, whole), calls)
    return found


def as_arrays(tensors):
    """What crosses to another process: a tensor's memory ends with the rank."""
    return {name: tensor.numpy() for name, tensor in tensors.items()}


def one_way(groups, path, folder, ended):
    """(why a run ended, or its second moments; forward passes)"""
    found, calls = run(groups, path, folder, "moved" * 20, **ended)
    return (found if ended else as_arrays(found[1])), calls


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    path = random_nemo(folder / "m.nemo", LLAMA).path
    found = run_layout(all_ways, Layout(dp=2), path, folder / "kept")
    # What two ranks kept when they were cut: gone on from under a layout that shares out units and slices of samples.
    found["elsewhere"] = [run_layout(one_way, layout, path, folder / "moved", {"cut_in": 6} if first else {})
                          for first, layout in ((True, Layout(dp=2)), (False, LAYOUTS["tp2_sp"]))]  # fmt: skip
    return found


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


def test_second_moments_go_on_under_another_layout(found):
    (why, _), (moments, calls) = found["elsewhere"]
    assert why == "PowerCutError: "
    assert 0 < calls < found["calls"] * 2, "the samples before are not heard again"
    assert moments["tokens"] == found["moments"]["tokens"] == SAMPLES * SEQ
    for name, whole in found["moments"].items():
        np.testing.assert_allclose(moments[name], whole, rtol=1e-5, atol=1e-6 * abs(whole).max(), err_msg=name)


def test_damaged_sums_and_those_of_another_estimate_are_begun_anew(found):
    assert found["damaged"] == found["another"] == (True, found["calls"])
