"""A key that no section declares is refused wherever it is added, also with `+`, which Hydra lets through."""

import pytest

from minitron_nemo.config.compose import compose
from minitron_nemo.errors import UserError

ADDED = [
    "surprise",
    "trainer.surprise",
    "distill.training.surprise",
    "distill.training.optim.surprise",
    "prepare_data.corpora.code.surprise",
    "_target_",
    "distill.training._target_",
]


@pytest.mark.parametrize("key", ADDED)
def test_an_added_key_that_nobody_declares_is_refused_by_its_name(key):
    with pytest.raises(UserError, match=rf"^{key}: unknown key") as refusal:
        compose("quickstart", [f"+{key}=1"])
    assert "\n" not in str(refusal.value)
