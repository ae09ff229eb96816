"""Second moments through the real engine: in every layout the same file, and what a plain forward pass gives."""

import pytest
import torch
from layouts import load_model
from plain_moments import moments_of, recorded

from minitron_nemo.checkpoint.formats.nemo import open_nemo
from minitron_nemo.engine.schedule import forward_hidden
from minitron_nemo.errors import UserError
from minitron_nemo.importance.hooks import listening
from minitron_nemo.importance.second_moments import FILE, SecondMomentFile, listening_to_second_moments, shapes
from minitron_nemo.steps.score_folders import Estimated
from minitron_nemo.testing import ALONE, LAYOUTS, TINY, random_batch, random_nemo, run_layout

FAMILIES = ("llama", "nemotron")  # both norms, both activations
CHECKED = {"alone": ALONE, **{name: LAYOUTS[name] for name in ("tp2_sp", "dp2", "tp2_pp2")}}


def tokens_of(arch):
    return random_batch(arch, samples=4, seed=5)["tokens"]


def gather(groups, models, folder):
    """Writes what recipes write: a folder of scores and second moments for each model."""
    for name, path in models.items():
        arch = open_nemo(path).arch
        model = load_model(path, groups).eval()
        with (
            listening(model, arch=arch, groups=groups) as statistics,
            listening_to_second_moments(model, arch=arch, groups=groups) as moments,
        ):
            for tokens in tokens_of(arch).chunk(groups.layout.dp)[groups.dp_rank].split(2):
                forward_hidden(model, [{"tokens": tokens}])
        found = Estimated(statistics.sums(), "l2", second_moments=moments.tensors)
        found.write(folder / name if groups.is_main else None)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {name: random_nemo(folder / f"{name}.nemo", TINY[name]).path for name in FAMILIES}


@pytest.fixture(scope="module")
def expected(models):
    found = {}
    for name, path in models.items():
        source = open_nemo(path).weights
        found[name] = moments_of(recorded(source, tokens_of(source.arch)).heard)
    return found


@pytest.mark.parametrize("layout", CHECKED)
def test_second_moments_are_those_of_a_plain_forward_pass_in_every_layout(layout, models, expected, tmp_path):
    for name in models:
        (tmp_path / name).mkdir()
    run_layout(gather, CHECKED[layout], models, tmp_path)
    for name, tensors in expected.items():
        file = SecondMomentFile(tmp_path / name, TINY[name])
        assert file.tokens == float(tensors.pop("tokens")) == 64
        assert set(tensors) | {"tokens"} == set(shapes(TINY[name]))
        for tensor, wanted in tensors.items():
            site, _, layer = tensor.partition(".layer_")
            products, sums = file.sums(site, int(layer) if layer else None)
            size = float(wanted.abs().max())
            torch.testing.assert_close(products, wanted[:-1], rtol=1e-4, atol=1e-5 * size, msg=f"{name} {tensor}")
            torch.testing.assert_close(sums, wanted[-1], rtol=1e-4, atol=1e-5 * size, msg=f"{name} {tensor}")
        tensors["tokens"] = torch.tensor([64.0])
    with pytest.raises(UserError, match="made from another model"):
        SecondMomentFile(tmp_path / "llama", TINY["nemotron"].resized({"num_layers": 3}))
    (tmp_path / "llama" / FILE).write_bytes(b"garbage")
    with pytest.raises(UserError, match="cannot be read .*run estimate_importance again"):
        SecondMomentFile(tmp_path / "llama", TINY["llama"])
    with pytest.raises(UserError, match="no second moments.*second_moments=true"):
        SecondMomentFile(tmp_path, TINY["llama"])
