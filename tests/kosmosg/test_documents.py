"""Documents packed into one row and kept apart are computed as if each stood alone."""

import pytest
import torch

from kosmosg.models.mllm import MLLM
from kosmosg.prompt import PromptBatch
from tests import tiny

LENGTHS = (5, 9, 7)
BOS, PAD, IMAGE = 0, 1, 7


def document(length: int, with_image: bool) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(8, 40, (length,))
    ids[0] = BOS
    mask = torch.zeros(length, dtype=torch.bool)
    if with_image:
        mask[2 : 2 + tiny.IMAGE_TOKENS] = True
        ids[mask] = IMAGE
    return ids, mask


@pytest.mark.parametrize("xpos", [False, True])
def test_packed_documents_equal_single_ones(xpos: bool) -> None:
    mllm = MLLM(vocab_size=40, **{**tiny.mllm_sizes(), "xpos": xpos}).eval()
    documents = [document(length, with_image=number != 0) for number, length in enumerate(LENGTHS)]
    images = torch.randn(2, 3, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE)
    # One row of three documents and padding.
    ids = torch.cat([*(ids for ids, _ in documents), torch.full((4,), PAD)])[None]
    mask = torch.cat([*(mask for _, mask in documents), torch.zeros(4, dtype=torch.bool)])[None]
    row = PromptBatch(ids, mask, images, ids == PAD)
    with torch.no_grad():
        packed = mllm(row, separate_documents=True)[0]
        leaking = mllm(row)[0]
        begin = 0
        for number, (ids, mask) in enumerate(documents):
            own = images[number - 1 : number] if number else None
            alone = mllm(PromptBatch(ids[None], mask[None], own, torch.zeros_like(mask)[None]))[0]
            end = begin + len(ids)
            torch.testing.assert_close(packed[begin:end], alone, rtol=1e-5, atol=1e-5)
            assert number == 0 or not torch.allclose(leaking[begin:end], alone, atol=1e-2)
            begin = end
