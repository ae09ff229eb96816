"""Sums by place and by source: each token in its own bins, whatever the chunks; against whole logits in float64."""

import pytest
import torch
from torch.nn.functional import cross_entropy, log_softmax

from minitron_nemo.losses.lm_head import HeadLoss
from minitron_nemo.losses.tallies import Tallies
from minitron_nemo.training.objectives import facts_of_tokens, means

SAMPLES, PLACES, VOCAB = 3, 10, 37
SOURCES = ("code", "prose")


def micro_batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {
        "labels": torch.randint(0, VOCAB, (SAMPLES, PLACES), generator=generator),
        "loss_mask": (torch.rand(SAMPLES, PLACES, generator=generator) > 0.3).float(),
        "sources": torch.tensor([1, 0, 1])[:, None].expand(SAMPLES, PLACES),
        "positions": torch.arange(PLACES),
    }


def test_a_sample_has_eight_equal_parts_or_as_many_as_it_has_tokens():
    assert Tallies(16384).bins[:2] == ("position_0-2047", "position_2048-4095")
    assert len(Tallies(16384).bins) == 8
    assert Tallies(3).bins == ("position_0-0", "position_1-1", "position_2-2")
    widths = [int(end) - int(start) + 1 for start, end in
              (name.removeprefix("position_").split("-") for name in Tallies(100).bins)]  # fmt: skip
    assert sum(widths) == 100
    assert max(widths) - min(widths) <= 1


def test_sources_have_bins_where_there_are_several():
    assert Tallies(8, SOURCES).bins[8:] == ("source_code", "source_prose")
    assert len(Tallies(8, ("text",)).bins) == 8


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_tallies_of_the_head_are_means_over_the_tokens_of_each_bin(chunk):
    generator = torch.Generator().manual_seed(4)
    student, teacher = (
        tuple(torch.randn(*shape, generator=generator) for shape in ((PLACES * SAMPLES, 8), (VOCAB, 8)))
        for _ in range(2)
    )
    batch, tallies = micro_batch(), Tallies(PLACES, SOURCES)
    head = HeadLoss(vocab_size=VOCAB, chunk_tokens=chunk, tallies=tallies)
    found = means({name: float(x) for name, x in head(student, teacher, **facts_of_tokens(batch, head)).sums.items()})

    s, t = ((x.double() @ w.double().T).unflatten(0, (PLACES, SAMPLES)).transpose(0, 1) for x, w in (student, teacher))
    log_p, log_q = log_softmax(t, dim=2), log_softmax(s, dim=2)
    values = {
        "forward_kl": (log_p.exp() * (log_p - log_q)).sum(dim=2),
        "cross_entropy": cross_entropy(s.transpose(1, 2), batch["labels"], reduction="none"),
    }
    for name, x in values.items():
        bins = {f"source_{source}": batch["sources"] == number for number, source in enumerate(SOURCES)}
        for bin_name in tallies.bins[:-2]:
            first, last = map(int, bin_name.removeprefix("position_").split("-"))
            bins[bin_name] = ((torch.arange(PLACES) >= first) & (torch.arange(PLACES) <= last)).expand(SAMPLES, PLACES)
        assert bins.keys() == set(tallies.bins)
        for bin_name, inside in bins.items():
            weight = inside * batch["loss_mask"].double()
            assert weight.sum() > 0
            wanted = float((x * weight).sum() / weight.sum())
            assert found[f"{name}/{bin_name}"] == pytest.approx(wanted, rel=1e-5), bin_name
    assert not any(name.startswith("tokens") for name in found)


def test_without_a_teacher_the_text_alone_is_tallied():
    batch, tallies = micro_batch(), Tallies(PLACES, SOURCES)
    head = HeadLoss(vocab_size=VOCAB, cross_entropy_weight=1.0, tallies=tallies)
    student = (torch.randn(PLACES * SAMPLES, 8), torch.randn(VOCAB, 8))
    sums = head(student, **facts_of_tokens(batch, head)).sums
    assert tuple(sums) == head.sum_names(with_teacher=False)
    assert "cross_entropy/source_code" in sums
    assert not any(name.startswith("forward_kl") for name in sums)


def test_what_is_not_finite_stays_in_its_own_bin():
    tallies = Tallies(2, SOURCES)
    bins_KN = tallies.sort(torch.arange(2), torch.tensor([[0, 0], [1, 1]]))
    values = torch.tensor([[torch.nan, 1.0, 2.0, 4.0]], dtype=torch.float64)  # the first place of the first sample
    assert tallies.bins == ("position_0-0", "position_1-1", "source_code", "source_prose")
    (found,) = tallies.tally(values, bins_KN).tolist()
    assert found == pytest.approx([float("nan"), 6.0, float("nan"), 5.0], nan_ok=True)


def test_a_bin_without_tokens_has_no_mean():
    sums = {"tokens": 2.0, "loss": 4.0, "tokens/source_a": 0.0, "loss/source_a": 0.0, "tokens/source_b": 2.0,
            "loss/source_b": 4.0}  # fmt: skip
    assert means(sums) == {"loss": 2.0, "loss/source_b": 2.0}
