"""Writing GGUF files: tensor after tensor, the file whole or not at all.

Authority: ggml, ``docs/gguf.md``; llama.cpp, ``gguf-py/gguf/gguf_writer.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from uqff.container.atomic import atomic_file
from uqff.container.staging import check_space
from uqff.errors import FormatError
from uqff.gguf.schema import DEFAULT_ALIGNMENT, TensorInfo, Value, aligned, build_head
from uqff.progress import Progress, Steps

__all__ = ["PlannedTensor", "write_gguf"]


class PlannedTensor(NamedTuple):
    """A tensor to be written.

    Attributes:
        name: of the tensor.
        shape: in elements, outermost first.
        type: its ggml type.
        nbytes: of its payload.
        chunks: gives bytes-like objects that together are the payload.
    """

    name: str
    shape: tuple[int, ...]
    type: int
    nbytes: int
    chunks: Callable[[], Iterable[Any]]


def write_gguf(
    path: Path,
    pairs: Sequence[tuple[str, Value]],
    tensors: Sequence[PlannedTensor],
    progress: Progress | None = None,
) -> int:
    """Write a GGUF file, version 3, aligned to 32 bytes.

    Args:
        path: of the file; replaced if it is there.
        pairs: metadata, in order.
        tensors: in order.
        progress: called after each tensor.

    Returns:
        The size of the file in bytes.

    Raises:
        FormatError: a payload has another size than planned, or a number does not fit its field.
        OSError: writing failed; nothing stays behind.
    """
    infos, at = [], 0
    for tensor in tensors:
        infos.append(TensorInfo(tensor.name, tensor.shape, tensor.type, at))
        at = aligned(at + tensor.nbytes, DEFAULT_ALIGNMENT)
    head = build_head(pairs, infos)
    steps = Steps(progress, "convert", len(tensors), sum(math.prod(tensor.shape) for tensor in tensors), "weights")
    check_space(path, sum(tensor.nbytes for tensor in tensors))
    with atomic_file(path) as file:
        size = file.write(head + bytes(-len(head) % DEFAULT_ALIGNMENT))
        for tensor in tensors:
            written = 0
            for chunk in tensor.chunks():
                written += file.write(memoryview(chunk).cast("B"))
            if written != tensor.nbytes:
                raise FormatError(
                    "tensor changed while it was written",
                    file=str(path),
                    field=tensor.name,
                    expected=f"{tensor.nbytes} bytes",
                    got=written,
                )
            size += written + file.write(bytes(-written % DEFAULT_ALIGNMENT))
            steps.add(tensor.name, math.prod(tensor.shape))
    return size
