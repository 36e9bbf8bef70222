"""Which way to convert."""

from __future__ import annotations

from uqff.checkpoints.gguf.files import is_gguf
from uqff.container.shards import PathLike, select
from uqff.conversion.from_gguf import uqff_of_gguf
from uqff.conversion.result import Conversion
from uqff.conversion.to_gguf import gguf_of_uqff
from uqff.errors import UnsupportedError
from uqff.progress import Progress

__all__ = ["convert"]


def convert(
    source: PathLike,
    target: PathLike,
    *,
    to: str | None = None,
    version: str | tuple[int, int, int] = "1.2",
    assets: PathLike | None = None,
    mmproj: PathLike | None = None,
    dtype: str = "f32",
    requantize: str | int | None = None,
    strict: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> Conversion:
    """Convert a GGUF file to UQFF, or a UQFF model to GGUF: whichever the source is not.

    Args:
        source: a GGUF file, or whatever :func:`uqff.open` takes.
        target: the directory or the file to make.
        to: ``uqff`` or ``gguf``, to be sure; None: what the source is not.
        version: of UQFF, if that is written.
        assets: see :func:`uqff.conversion.uqff_of_gguf`.
        mmproj: of a GGUF file, see :func:`uqff.open_checkpoint`.
        dtype: of the residual, if UQFF is written.
        requantize: see :func:`uqff.conversion.uqff_of_gguf`.
        strict: refuse to write UQFF that the engine could not load or run, see :mod:`uqff.models.engine`.
        force: replace what is in ``target``.
        progress: called after each layer or tensor.

    Raises:
        UnsupportedError: the source is of the kind that was asked for.
        UqffError: see :func:`uqff.conversion.uqff_of_gguf`.
        OSError: reading or writing failed; nothing stays behind.

    >>> made = uqff.convert("model.gguf", "from-gguf")
    >>> made.format, sorted(made.types)
    ('UQFF 1.2.0', ['q8_0'])
    """
    source = select(source, mmproj=mmproj)
    kind = "gguf" if is_gguf(source) else "uqff"
    if to == kind:
        raise UnsupportedError(f"is {kind.upper()} already", file=str(source))
    if kind == "gguf":
        return uqff_of_gguf(
            source,
            target,
            version=version,
            assets=assets,
            mmproj=mmproj,
            dtype=dtype,
            requantize=requantize,
            strict=strict,
            force=force,
            progress=progress,
        )
    if mmproj is not None:
        raise UnsupportedError("only GGUF files have an mmproj file", field="mmproj", got=str(source))
    return gguf_of_uqff(source, target, assets=assets, force=force, progress=progress)
