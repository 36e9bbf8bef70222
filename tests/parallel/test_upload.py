"""What goes to a device in pieces is all there; that it goes there at all is in test_cuda.py."""

from __future__ import annotations

import pytest
import torch

from uqff.parallel.upload import SMALL, Upload


@pytest.mark.parametrize("elements", [SMALL // 4, SMALL // 4 + 1, 3 * SMALL // 4, 5 * SMALL // 8])
def test_every_byte_arrives(elements: int) -> None:
    """Whole pieces, and a rest that is shorter than what the buffer held before; a view with strides, too."""
    send = Upload(torch.device("cpu"), SMALL // 2)
    for given in (torch.arange(elements, dtype=torch.int32), torch.arange(2 * elements, dtype=torch.int32)[::2]):
        made = send(given)
        assert torch.equal(made, given)
        assert made.is_contiguous() or given.nbytes <= SMALL


def test_what_was_sent_is_no_view() -> None:
    """The file may be closed, the tensor changed."""
    given = torch.zeros(SMALL + 1, dtype=torch.float8_e4m3fn)
    made = Upload(torch.device("cpu"))(given)
    given.view(torch.uint8).fill_(1)
    assert not made.view(torch.uint8).any()


def test_inference_mode_comes_and_goes() -> None:
    """Buffers that were made within it serve outside, and the other way round."""
    given = torch.arange(SMALL, dtype=torch.int32)
    with torch.inference_mode():
        send = Upload(torch.device("cpu"), SMALL // 2)
        assert torch.equal(send(given), given)
    assert torch.equal(send(given), given)
    with torch.inference_mode():
        assert torch.equal(send(given), given)


def test_tensors_share_a_buffer() -> None:
    """Those that were sent stay as they are when others follow, whichever buffer they went through."""
    send = Upload(torch.device("cpu"), 3 * SMALL)
    given = [torch.full((SMALL + 1 + 300 * i,), i, dtype=torch.uint8) for i in range(9)]
    for one, other in zip([send(each) for each in given], given, strict=True):
        assert torch.equal(one, other)
