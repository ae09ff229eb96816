"""A stored chunk of another shape than the metadata says is refused, also where it would fit by broadcasting."""

import pytest
import torch

from minitron_nemo.checkpoint.geometry import Box
from minitron_nemo.checkpoint.torch_dist import TorchDistReader, TorchDistWriter, write_metadata
from minitron_nemo.errors import UserError


@pytest.mark.parametrize("stored", [(1, 2), (4, 1), (2, 4), (8,)], ids=str)
@pytest.mark.parametrize("box", [None, Box((1, 0), (2, 2))], ids=["whole", "part"])
def test_a_chunk_of_another_shape_is_refused(stored, box, tmp_path):
    writer = TorchDistWriter(tmp_path)
    offset = (0,) * len(stored)
    writer.write(
        "x", torch.arange(float(torch.Size(stored).numel())).reshape(stored), global_shape=stored, offset=offset
    )
    (record,) = writer.close()
    write_metadata(tmp_path, [{**record, "global_shape": [4, 2], "size": [4, 2], "offset": [0, 0]}])
    with pytest.raises(UserError, match="chunk of x"):
        TorchDistReader(tmp_path).read("x", box)
