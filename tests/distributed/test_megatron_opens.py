"""Megatron-Core's own `dist_checkpointing.load` opens what we write, at its default strictness and in any layout."""

import dataclasses
from importlib.metadata import version

import pytest
import torch

from minitron_nemo.artefacts.contents import contents_of
from minitron_nemo.artefacts.origin import Origin
from minitron_nemo.checkpoint.formats import megatron, nemo2
from minitron_nemo.checkpoint.formats.checkpoint import Checkpoint
from minitron_nemo.checkpoint.formats.nemo import open_nemo
from minitron_nemo.checkpoint.source import stream
from minitron_nemo.distributed.layout import Layout
from minitron_nemo.testing import ALONE, LAYOUTS, TINY, random_nemo, run_layout


def loaded_by_megatron(groups, folders):
    """For each (model, folder of torch_dist) the parameters that differ from those that our own loader fills."""
    from megatron.core import dist_checkpointing

    from minitron_nemo.engine.model import BuildOptions, build_model
    from minitron_nemo.engine.weights import load_weights

    found = []
    for path, folder in folders:
        source = open_nemo(path)
        ours, theirs = (build_model(source.arch, BuildOptions(groups=groups)) for _ in range(2))
        load_weights(ours, source.weights, groups)
        (gpt,) = theirs.gpts()
        prefix = nemo2.PREFIX if folder.name == nemo2.WEIGHTS else ""
        loaded = dist_checkpointing.load({"model": gpt.sharded_state_dict(prefix=prefix)}, str(folder))
        gpt.load_state_dict({name.removeprefix(prefix): tensor for name, tensor in loaded["model"].items()})
        differ = []
        if folder.name.startswith("iter_") and loaded["args"].num_layers != source.arch.num_layers:
            differ.append("args")
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
    """Out of our own folders, of NeMo 2's, and of runs written for it in four files, from 0.19 on in its own form."""
    keeps_objects = tuple(map(int, version("megatron-core").split(".")[:2])) >= (0, 19)
    folders = []
    for family, arch in TINY.items():
        arch = dataclasses.replace(arch, rope_scaling=None)
        model = random_nemo(tmp_path / f"{family}.nemo", arch)
        run = tmp_path / f"{family}_run"
        checkpoint = Checkpoint(model.path, "nemo", arch, model.dtype, model.weights)
        megatron.write(run, checkpoint, stream(model.weights), origin=Origin("run"), layout=Layout(tp=2, pp=2),
                       common_is_object=keeps_objects)  # fmt: skip
        assert megatron.open_checkpoint(contents_of(run)).arch == arch
        folders += [(model.path, model.path / "model_weights"), (model.path, run / "iter_0000001")]
        if family == "llama":
            nemo2.write(tmp_path / "nemo2", checkpoint, stream(model.weights), origin=Origin("nemo2"))
            folders.append((model.path, tmp_path / "nemo2" / nemo2.WEIGHTS))
    for on_rank in run_layout(loaded_by_megatron, {"alone": ALONE, **LAYOUTS}[layout], folders):
        assert on_rank == [[]] * len(folders)
