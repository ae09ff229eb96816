"""One record answers for degrees, stages and shares: nothing is lost, and what cannot be is refused by name."""

import dataclasses
import itertools

import pytest

from minitron_nemo.distributed.layout import Layout, context_chunks, legal_tp
from minitron_nemo.errors import UserError
from minitron_nemo.shape.arch import ModelArch

ARCH = ModelArch(32, 4096, 14336, 32, 8, 128, 128256, 131072)


@pytest.mark.parametrize(("samples", "micro", "dp"), [(8, 1, 1), (8, 2, 2), (24, 3, 4), (1152, 2, 8)])
def test_the_shares_of_all_ranks_are_every_sample_of_the_batch_once(samples, micro, dp):
    share = Layout(dp=dp).share(samples, micro)
    starts = [first for rank in range(dp) for first in share.first_samples(rank, start=100)]
    covered = [first + offset for first in starts for offset in range(micro)]
    assert sorted(covered) == list(range(100, 100 + samples))
    assert share.num_microbatches == len(starts) / dp == samples / micro / dp


@pytest.mark.parametrize(("samples", "micro", "dp"), [(3, 1, 2), (8, 3, 1), (0, 1, 1), (4, 4, 2)])
def test_a_batch_that_would_leave_samples_out_is_refused(samples, micro, dp):
    with pytest.raises(UserError, match=rf"num_samples={samples}: must be a multiple of .* = {micro} x {dp}"):
        Layout(dp=dp).share(samples, micro, name="num_samples")


@pytest.mark.parametrize(("layers", "pp"), list(itertools.product((3, 4, 7, 32), (1, 2, 3))))
def test_stages_hold_every_layer_and_the_last_never_more_than_another(layers, pp):
    stages = Layout(pp=pp).stages(layers)
    assert (len(stages), sum(stages)) == (pp, layers)
    assert stages == sorted(stages, reverse=True)
    assert max(stages) - min(stages) <= 1


@pytest.mark.parametrize(("layers", "pp", "split"), [(1, 2, None), (4, 2, [4]), (4, 2, [4, 0]), (4, 2, [1, 2])])
def test_stages_that_lose_a_layer_or_are_empty_are_refused(layers, pp, split):
    with pytest.raises(UserError, match="layers"):
        Layout(pp=pp).stages(layers, split)
    assert Layout(pp=2).stages(5, [1, 4]) == [1, 4]


def test_chunks_of_all_stages_are_every_chunk_once_and_neighbours_are_on_neighbouring_stages():
    layout = Layout(pp=3, vpp=2)
    assert [layout.chunks_of(stage) for stage in range(3)] == [[0, 3], [1, 4], [2, 5]]
    assert layout.stages(7) == [2, 1, 1, 1, 1, 1]
    assert layout.stages(7, [1, 1, 1, 1, 1, 2]) == [1, 1, 1, 1, 1, 2]
    with pytest.raises(UserError, match=r"needs 6 numbers"):
        layout.stages(7, [3, 2, 2])
    with pytest.raises(UserError, match=r"size=3 x virtual_pipeline_model_parallel_size=2: a model of 5 layers"):
        layout.stages(5)


def test_an_interleaved_pipeline_takes_whole_groups_of_micro_batches():
    Layout(pp=3).check_schedule(4, name="x")
    Layout(pp=3, vpp=2).check_schedule(6, name="x")
    with pytest.raises(UserError, match=r"^x: 4 micro-batches .* multiple of pipeline_model_parallel_size=3"):
        Layout(pp=3, vpp=2).check_schedule(4, name="x")


def test_what_tensor_and_pipeline_parallelism_leave_is_data_parallel():
    for tp, pp, dp in itertools.product((1, 2, 4), (1, 2), (1, 3)):
        layout = Layout.of_world(tp * pp * 2 * dp, tp=tp, pp=pp, cp=2, vpp=pp)
        assert layout == Layout(tp=tp, pp=pp, cp=2, vpp=pp, dp=dp)
        assert (layout.model_ranks, layout.batch_ranks, layout.world_size) == (tp * pp, 2 * dp, tp * pp * 2 * dp)
    with pytest.raises(UserError, match="6 ranks: must be a multiple of .* = 4"):
        Layout.of_world(6, tp=2, pp=2)


@pytest.mark.parametrize("degrees", [{"tp": 0}, {"dp": -1}, {"cp": 0}, {"vpp": 2}, {"sequence_parallel": True}])
def test_degrees_that_cannot_be_are_refused(degrees):
    with pytest.raises(UserError):
        Layout(**degrees)


def test_legal_tensor_parallel_degrees_are_those_that_the_check_lets_pass():
    for arch in (ARCH, dataclasses.replace(ARCH, num_attention_heads=24, num_query_groups=6, ffn_hidden_size=60)):
        passing = []
        for tp in range(1, 33):
            try:
                Layout(tp=tp).check(arch)
            except UserError as error:
                assert f"allowed are {', '.join(map(str, legal_tp(arch)))}" in str(error)  # noqa: PT017
            else:
                passing.append(tp)
        assert passing == legal_tp(arch)
    assert legal_tp(ARCH) == [1, 2, 4, 8]


def test_the_vocabulary_is_padded_to_eight_rows_a_rank_only_where_it_is_split():
    for vocabulary, tp in itertools.product((131, 128, 128256), (1, 2, 4, 8)):
        rows = Layout(tp=tp).padded_vocab_size(dataclasses.replace(ARCH, vocab_size=vocabulary))
        assert rows >= vocabulary
        assert rows - vocabulary < 8 * tp
        assert rows == vocabulary if tp == 1 else rows % (8 * tp) == 0


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_context_parallel_ranks_have_every_chunk_once_and_see_equally_many_tokens(size):
    chunks = [context_chunks(rank, size) for rank in range(size)]
    assert sorted(chunk for own in chunks for chunk in own) == list(range(2 * size))
    assert {sum(own) for own in chunks} == {2 * size - 1}


def test_context_parallel_ranks_must_share_a_sequence_evenly():
    Layout(cp=3).check_sequence(18)
    Layout(tp=2, cp=2, sequence_parallel=True).check_sequence(12)
    with pytest.raises(UserError, match=r"data\.seq_length=15: .* multiple of 2 x context_parallel_size=3"):
        Layout(cp=3).check_sequence(15)
    with pytest.raises(UserError, match=r"data\.seq_length=12: .* tensor_model_parallel_size=4 x context_parallel_s"):
        Layout(tp=4, cp=2, sequence_parallel=True).check_sequence(12)


def test_sequence_parallel_ranks_must_share_a_sequence_evenly():
    Layout(tp=4).check_sequence(30)
    Layout(tp=2, sequence_parallel=True).check_sequence(30)
    with pytest.raises(UserError, match=r"data\.seq_length=30: .* tensor_model_parallel_size=4"):
        Layout(tp=4, sequence_parallel=True).check_sequence(30)
