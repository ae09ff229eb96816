"""Megatron-Core's own `dist_checkpointing.load` opens what we write, at its default strictness and in any layout."""

import pytest
import torch

from minitron_nemo.checkpoint.formats.nemo import open_nemo
from minitron_nemo.testing import ALONE, LAYOUTS, TINY, random_nemo, run_layout


def loaded_by_megatron(groups, paths):
    """For each model the parameters that differ from those that our own loader fills, on any rank."""
    from megatron.core import dist_checkpointing

    from minitron_nemo.engine.model import BuildOptions, build_model
    from minitron_nemo.engine.weights import load_weights

    found = []
    for path in paths:
        source = open_nemo(path)
        ours, theirs = (build_model(source.arch, BuildOptions(groups=groups)) for _ in range(2))
        load_weights(ours, source.weights, groups)
        (gpt,) = theirs.gpts()
        gpt.load_state_dict(dist_checkpointing.load(gpt.sharded_state_dict(), str(path / "model_weights")))
        differ = []
        for (name, want), got in zip(ours.gpts()[0].named_parameters(), gpt.parameters(), strict=True):
            rows = want.shape[0]
            if name.startswith(("embedding", "output_layer")):  # padding is whatever was there
                rows = max(0, min(rows, source.arch.vocab_size - groups.tp_rank * rows))
            if not torch.equal(want[:rows], got[:rows]):
                differ.append(name)
        found.append(differ)
    return groups.share_json(found)


@pytest.mark.parametrize("layout", ["alone", "tp2", "pp2"])
def test_megatron_loads_every_parameter_of_ours(layout, tmp_path):
    paths = [random_nemo(tmp_path / f"{family}.nemo", arch).path for family, arch in TINY.items()]
    for on_rank in run_layout(loaded_by_megatron, {"alone": ALONE, **LAYOUTS}[layout], paths):
        assert on_rank == [[]] * len(paths)
