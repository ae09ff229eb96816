"""NeMo restores, holds, calls and saves our models; the claims themselves are in `nemo_checks.py`."""

import tarfile

import pytest
from nemo_checks import CHECKS, EXTRACTING, check_all

from minitron_nemo.distributed.launch import run_on_ranks


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Claim -> what is wrong with it. One process for all, as NeMo takes seconds to import."""
    return run_on_ranks(check_all, tmp_path_factory.mktemp("nemo"), num_ranks=1)


@pytest.mark.parametrize("claim", CHECKS)
def test_nemo_and_these_recipes_agree(claim, found):
    if claim in EXTRACTING and not hasattr(tarfile, "data_filter"):
        pytest.skip("NeMo's own extraction needs Python 3.11.4")
    assert not found[claim], found[claim]
