"""Boxes share what their elements share, and chunks cover a tensor only when every element is in just one."""

import itertools
import math

import pytest
import torch

from minitron_nemo.checkpoint.geometry import Box, Chunk, StoredTensor, coverage_fault, whole

BOXES = [Box(offset, size) for offset in itertools.product(range(3), repeat=2) for size in ((1, 1), (2, 3), (3, 1))]


def elements(box):
    return set(itertools.product(*(range(o, o + s) for o, s in zip(box.offset, box.size, strict=True))))


@pytest.mark.parametrize("first", BOXES, ids=str)
def test_what_two_boxes_share_is_what_their_elements_share(first):
    for second in BOXES:
        shared = first.shared_with(second)
        assert elements(first) & elements(second) == (elements(shared) if shared else set())
        assert shared is None or elements(shared), "what only touches shares nothing, and is not read"


def test_slices_are_the_box_of_the_tensor_and_of_a_part_of_it():
    full = torch.arange(48).reshape(6, 8)
    box = Box((2, 3), (3, 4))
    assert torch.equal(full[box.slices()], full[2:5, 3:7])
    assert torch.equal(full[1:, 2:][box.slices((1, 2))], full[2:5, 3:7])
    assert whole((6, 8)).slices() == (slice(0, 6), slice(0, 8))


def test_an_overlap_is_a_fault_though_the_elements_count_up():
    """Row 1 twice and row 3 never: as many elements as the tensor has."""
    boxes = [Box((0, 0), (2, 3)), Box((1, 0), (2, 3))]
    chunks = tuple(Chunk(box.offset, box.size, "f", 0, 6) for box in boxes)
    assert coverage_fault(StoredTensor((4, 3), torch.float32, chunks)) == ("the chunks at (0, 0) and (1, 0) overlap")


@pytest.mark.parametrize("seed", range(30))
def test_random_chunks_are_faulty_unless_each_element_is_in_exactly_one(seed):
    generator = torch.Generator().manual_seed(seed)
    shape, draw = (4, 3), lambda limit: int(torch.randint(0, limit, (1,), generator=generator))
    cut = 1 + draw(3)
    boxes = [Box((0, 0), (cut, 3)), Box((cut, 0), (4 - cut, 1 + draw(3)))]
    if boxes[1].size[1] < 3 and draw(2):
        boxes.append(Box((cut, boxes[1].size[1]), (4 - cut, 3 - boxes[1].size[1])))
    counts = [sum(element in elements(box) for box in boxes) for element in elements(whole(shape))]
    chunks = tuple(Chunk(box.offset, box.size, "f", 0, math.prod(box.size)) for box in boxes)
    fault = coverage_fault(StoredTensor(shape, torch.float32, chunks))
    assert (fault is None) == all(count == 1 for count in counts)
