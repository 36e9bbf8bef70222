"""The 1.x layer: one quantised layer, weight and bias, as safetensors entries.

::

    KEY.weight.format   U8 []       the family
    KEY.weight          ...         the codes
    KEY.weight.*        ...         what else the family keeps
    KEY.bias            [out]       if the layer has one

The twin of :mod:`uqff.codec.blob`: entries here, bytes there, the same fields and records behind both.

Authority: mistral.rs v0.9.2, ``mistralrs-quant/src/uqff/reader.rs`` (``load_linear``) and ``serialize_uqff`` of each
family.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from uqff.codec.blob import check_bias
from uqff.codec.layer import Layer, Writable
from uqff.codes import ENTRY_VERSIONS, DType, Family, Version
from uqff.errors import FormatError, UnsupportedError, UqffError
from uqff.families import families, family_of
from uqff.families.base import QuantizedTensor
from uqff.schema.bricks import FieldTrace, Scope, Violation
from uqff.schema.entries import BIAS, BIAS_RULE, FORMAT, RawTensor

__all__ = ["LATEST", "family_of_format", "from_entries", "read_fields", "suffixes", "to_entries", "trace_of"]

LATEST = max(ENTRY_VERSIONS)
"""The newest 1.x version."""


def suffixes() -> frozenset[str]:
    """Every suffix that an entry of a layer can have."""
    return frozenset({FORMAT, BIAS, *(suffix for record in families() for suffix in record.ENTRIES.suffixes)})


def family_of_format(entry: RawTensor) -> Family:
    """The family of a layer, from its entry ``weight.format``.

    Raises:
        FormatError: the entry is not one byte.
        UnsupportedError: the number is not known.
    """
    if (entry.dtype, entry.shape, entry.data.nbytes) != ("U8", (), 1):
        got = f"{entry.dtype} {list(entry.shape)}"
        raise FormatError("not a number of one byte", rule="ENT-03", field=FORMAT, expected="U8 []", got=got)
    number = entry.data[0]
    family = Family.of_code(number)
    if family is None:
        known = ", ".join(f"{f.value} {f.title}" for f in Family)
        raise UnsupportedError("unknown type", rule="ENT-04", field=FORMAT, expected=f"one of {known}", got=number)
    return family


def read_fields(
    entries: Mapping[str, RawTensor], version: tuple[int, int, int] = LATEST
) -> tuple[type[QuantizedTensor], dict[str, Any]]:
    """Read and validate the fields of a layer; touches no payload and does not import torch.

    Args:
        entries: contents by suffix, ``weight.format`` among them.
        version: of the file.

    Returns:
        The record class of the family, and the fields by the names of its layout, with ``version``, ``quant_type`` and
        ``bias``.

    Raises:
        FormatError: an entry is missing, superfluous or breaks a rule.
        UnsupportedError: a family that this library does not know.
        ShapeError: weight and bias do not fit each other.
        In all of them ``field`` is the suffix of the entry.
    """
    if FORMAT not in entries:
        raise FormatError("missing entry", rule="ENT-01", field=FORMAT, expected="U8 []", got="no such entry")
    record = family_of(family_of_format(entries[FORMAT]))
    title = record.family.title
    for suffix in entries:
        if suffix not in (FORMAT, BIAS, *record.ENTRIES.suffixes):
            expected = ", ".join(record.ENTRIES.suffixes)
            raise FormatError(
                f"not an entry of {title} layers", rule="ENT-02", field=suffix, expected=expected, got=suffix
            )
    fields = record.fields_of(entries)
    shape = record.parse(fields).shape
    try:
        if BIAS in entries and not entries[BIAS].shape:
            check_bias(shape, ())  # as before 1.0: a shape that does not fit, rather than an entry of the wrong rank
        bias = _bias_fields(entries.get(BIAS))
        _check_version(record, shape, Version(*version), FormatError)
        if bias is not None:
            check_bias(shape, bias["shape"])
    except Violation as broken:
        raise broken.as_error(BIAS if broken.field == "bias.shape" else None) from None
    return record, {"version": Version(*version), "quant_type": record.family, **fields, "bias": bias}


def _bias_fields(entry: RawTensor | None) -> dict[str, Any] | None:
    if entry is None:
        return None
    return {"dtype": BIAS_RULE.check(entry), "shape": entry.shape, "data": entry.data}


def _check_version(
    record: type[QuantizedTensor], shape: tuple[int, ...], version: Version, error: type[UqffError]
) -> None:
    title, since, before = record.family.title, record.ENTRIES.since, record.ENTRIES.stacked_before
    if version < since:
        expected = f"version {since}"
        raise Violation(
            f"{title} layers did not exist yet",
            rule="ENT-05",
            field=FORMAT,
            expected=expected,
            got=version,
            error=error,
        )
    if before is not None and version >= before and len(shape) > 2:
        raise Violation(
            f"stacked {title} weights no longer exist",
            rule="ENT-06",
            field="weight",
            expected=f"two dimensions, or a version before {before}",
            got=list(shape),
            error=error,
        )


def from_entries(entries: Mapping[str, RawTensor], version: tuple[int, int, int] = LATEST) -> Layer:
    """The layer that entries hold. Its parts are views of them and keep them alive.

    Takes and raises what :func:`read_fields` does.
    """
    return Layer.of_fields(*read_fields(entries, version))


def to_entries(layer: Writable, version: tuple[int, int, int] = LATEST) -> dict[str, RawTensor]:
    """The entries of a layer by suffix, in the order in which the engine writes them.

    Payloads are not copied.  Tensors may be on the meta device: dtypes, shapes and sizes are known before payloads are.

    Args:
        layer: a weight, or a weight with its bias.
        version: 1.0.0, 1.1.0 or 1.2.0.

    Raises:
        UnsupportedError: the layer cannot be expressed in that version, or the version does not exist.
        ShapeError: the bias does not fit the weight.
        FormatError: the record is not consistent.
    """
    layer = Layer.of(layer)
    weight, bias = layer.weight, layer.bias_part
    if Version(*version) not in ENTRY_VERSIONS:
        known = ", ".join(map(str, ENTRY_VERSIONS))
        raise UnsupportedError("unknown version", rule="ENT-10", expected=f"one of {known}", got=Version(*version))
    entries = {FORMAT: RawTensor("U8", (), memoryview(bytes([weight.family]))), **weight.to_entries()}
    try:
        _check_version(type(weight), weight.shape, Version(*version), UnsupportedError)
        if bias is not None:
            entries[BIAS] = RawTensor(bias.dtype.safetensors, bias.shape, bias.payload)
            BIAS_RULE.check(entries[BIAS])
            check_bias(weight.shape, bias.shape)
    except Violation as broken:
        raise broken.as_error(BIAS if broken.field == "bias.shape" else None) from None
    return entries


def trace_of(
    record: type[QuantizedTensor], fields: Scope, entries: Mapping[str, RawTensor], offsets: Mapping[str, int]
) -> Iterator[FieldTrace]:
    """The entries of a valid layer as fields with place, type, value and meaning, in the order of ``offsets``.

    Args:
        record: of the family.
        fields: of :func:`read_fields`.
        entries: contents by suffix.
        offsets: where each begins; the places in the result count as these do.
    """
    rules = {rule.suffix: rule for rule in (*record.ENTRIES.members, BIAS_RULE)}
    for suffix, offset in offsets.items():
        entry, rule = entries[suffix], rules.get(suffix)
        value: Any = record.family if rule is None else fields[rule.field]
        if isinstance(value, Mapping):
            value = value["data"]
        if rule is not None and rule.dtypes == (DType.F32,) and not rule.dims:
            value = value.cast("B").cast("f")[0]
        meaning = "family of the layer" if rule is None else rule.meaning
        kind = f"{entry.dtype} {list(entry.shape)}"
        yield FieldTrace(suffix, offset, entry.data.nbytes, kind, value, meaning)
