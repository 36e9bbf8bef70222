"""The pre-1.0 blob: one quantised layer, weight and bias, as bytes.

A reader takes the first five bytes, chooses the family's layout by the type byte, and reads the whole blob with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from uqff.codec.layer import Layer, Writable
from uqff.codes import DType, Family, Version
from uqff.errors import FormatError, ShapeError, UnsupportedError, UqffError
from uqff.families import family_of
from uqff.families.base import QuantizedTensor
from uqff.schema.bricks import FieldTrace, Placeholder, Scope, Violation
from uqff.schema.header import HEADER
from uqff.schema.layout import Layout, offset_of_field

if TYPE_CHECKING:
    import torch

__all__ = [
    "LATEST",
    "blob_size",
    "check_bias",
    "chunks",
    "deserialize",
    "family_of_blob",
    "read_fields",
    "serialize",
    "trace",
]

LATEST = Version(0, 2, 0)
"""The pre-1.0 version written unless another is asked for."""


def read_fields(buffer: Any, *, trace: list[FieldTrace] | None = None) -> tuple[type[QuantizedTensor], Scope]:
    """Parse and validate a blob down to its fields; touches no payload and does not import torch.

    Args:
        buffer: any bytes-like object.
        trace: a list that receives every field with its place.

    Returns:
        The record class of the family, and the fields by name.

    Raises:
        FormatError: the bytes break a rule.
        UnsupportedError: a version or type that this library does not know.
        ShapeError: weight and bias do not fit each other.
    """
    record = family_of(HEADER.read(buffer, exact=False)["quant_type"])
    fields = record.LAYOUT.read(buffer, trace=trace)
    try:
        _validate(record, fields)
    except Violation as broken:
        raise broken.error(
            broken.problem,
            field=broken.field,
            offset=_offset_of(record.LAYOUT, buffer, broken.field),
            expected=broken.expected,
            got=broken.got,
            rule=broken.rule,
        ) from None
    return record, fields


def _offset_of(layout: Layout, buffer: Any, field: str | None) -> int | None:
    places: list[FieldTrace] = []
    layout.read(buffer, trace=places)
    return None if field is None else offset_of_field(places, field)


def _validate(record: type[QuantizedTensor], fields: Scope, *, too_old: type[UqffError] = FormatError) -> None:
    """The rules that hold for blobs of every family, and between them the family's own.

    Args:
        record: of the family.
        fields: of the blob.
        too_old: what to raise if the version does not have the family or a dtype yet.
    """
    version: Version = fields["version"]
    if version < record.family.since:
        raise Violation(
            f"{record.family.title} blobs did not exist yet",
            rule="BLOB-05",
            field="version",
            expected=f"at least {record.family.since}",
            got=version,
            error=too_old,
        )
    for path, dtype in _dtypes(fields):
        if version < dtype.since:
            raise Violation(
                f"dtype {dtype.name} did not exist yet",
                rule="BLOB-06",
                field=path,
                expected=f"version {dtype.since}",
                got=version,
                error=too_old,
            )
    record.validate(fields)
    if fields["bias"] is not None:
        check_bias(record.parse(fields).shape, fields["bias"]["shape"])


def _dtypes(fields: Scope) -> Iterator[tuple[str, DType]]:
    for name, value in fields.items():
        if isinstance(value, Mapping):
            yield f"{name}.dtype", value["dtype"]


def check_bias(weight_shape: tuple[int, ...], bias_shape: tuple[int, ...]) -> None:
    """A bias is one number per output: ``[out]``, or ``[experts, out]`` for stacked experts."""
    allowed = [weight_shape[at:-1] for at in range(len(weight_shape) - 1)]
    if bias_shape not in allowed:
        expected = " or ".join(str(list(shape)) for shape in reversed(allowed)) or "no bias"
        got = list(bias_shape)
        raise Violation(
            "bias does not fit weight", rule="BLOB-08", field="bias.shape", expected=expected, got=got, error=ShapeError
        )


def deserialize(buffer: Any) -> Layer:
    """Read one blob.

    All parts are views of ``buffer`` and keep it alive; nothing is copied until a tensor is asked for that lies at an
    unaligned address.  Views of a read-only buffer must not be written to.

    Args:
        buffer: any bytes-like object: ``bytes``, ``bytearray``, ``memoryview``, ``mmap``, a uint8 numpy array.

    Returns:
        The weight and the bias.

    Raises:
        FormatError: the bytes break a rule of the format.
        UnsupportedError: a version or type that this library does not know.
        ShapeError: weight and bias do not fit each other.

    >>> import numpy
    >>> weight, bias = uqff.deserialize(uqff.serialize(uqff.quantize(numpy.eye(32, dtype="f4"), "q8_0")))
    >>> weight.kind, weight.shape, bias
    ('q8_0', (32, 32), None)
    """
    return Layer.of_fields(*read_fields(_flat(buffer)))


def _flat(buffer: Any) -> memoryview:
    try:
        return memoryview(buffer).cast("B")
    except (TypeError, ValueError) as exc:
        raise FormatError("not a contiguous bytes-like object", got=type(buffer).__name__) from exc


def _laid_out(layer: Layer, version: Any) -> tuple[Layout, dict[str, Any]]:
    record, bias = type(layer.weight), layer.bias_part
    bias_field = None if bias is None else bias.fields()
    fields = {
        "version": Version(*version),
        "quant_type": record.family,
        **layer.weight.build(),
        "bias": bias_field,
    }
    record.LAYOUT.nbytes(fields)  # each field by itself; the rules that span several take that for granted
    try:
        _validate(record, fields, too_old=UnsupportedError)
    except Violation as broken:
        raise broken.as_error() from None
    return record.LAYOUT, fields


def chunks(weight: Writable, bias: torch.Tensor | None = None, *, version: tuple[int, int, int] = LATEST) -> list[Any]:
    """The blob as a list of byte chunks that need not be joined to be written; payloads are not copied.

    Takes and raises what :func:`serialize` does.
    """
    layout, fields = _laid_out(Layer.of(weight, bias), version)
    made = layout.chunks(fields)
    if any(isinstance(chunk, Placeholder) for chunk in made):
        raise FormatError("payload has no bytes: it is on the meta device")
    return made


def blob_size(weight: Writable, bias: torch.Tensor | None = None, *, version: tuple[int, int, int] = LATEST) -> int:
    """How long the blob will be. Tensors may be on the meta device: sizes are known before payloads exist."""
    layout, fields = _laid_out(Layer.of(weight, bias), version)
    return layout.nbytes(fields)


def serialize(
    weight: Writable, bias: torch.Tensor | None = None, *, version: str | tuple[int, int, int] = LATEST
) -> bytes:
    """Write one blob.

    Args:
        weight: the quantised weight, or a layer (whose bias is then the default).
        bias: ``[out]``, in the dtype to be stored.
        version: 0.1.0, 0.1.1, 0.1.2, 0.1.3 or 0.2.0, as a tuple or as text.

    Raises:
        UnsupportedError: the family or a dtype does not exist in that version, or the version does not exist.
        ShapeError: the bias does not fit the weight.
        FormatError: a length does not fit its field, or the record is not consistent.

    >>> import numpy
    >>> blob = uqff.serialize(uqff.quantize(numpy.eye(32, dtype="f4"), "q8_0"))
    >>> blob[:5].hex(" "), len(blob)
    ('00 02 00 00 00', 1114)
    """
    if isinstance(version, str):
        version = Version.of(version)
    return b"".join(chunks(weight, bias, version=version))


def trace(buffer: Any) -> list[FieldTrace]:
    """Every field of a valid blob with offset, size, type, value and meaning, in file order."""
    places: list[FieldTrace] = []
    read_fields(_flat(buffer), trace=places)
    return places


def family_of_blob(buffer: Any) -> Family:
    """The family of a blob, from its first five bytes."""
    family: Family = HEADER.read(buffer, exact=False)["quant_type"]
    return family
