"""Files that break exactly one rule of the container each, files that are something else, and a few sound ones."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import zipfile
from collections.abc import Iterator
from typing import Any, NamedTuple

from tools.vectors.wire import Blob, Chance, tensor, unquant

FORMAT, UNSUPPORTED = "FormatError", "UnsupportedError"
SECTION = "container.md#framing"
INDEX = "container.md#index"
FOREIGN = "container.md#foreign"


class BrokenFile(NamedTuple):
    """A broken file; reading is opening it and asking for every layer."""

    name: str
    section: str
    rule: str
    data: bytes
    error: str
    field: str | None
    offset: int


_c = Chance("bad/files")
LAYER: Blob = unquant(tensor("F32", 2, 3, data=_c.numbers("F32", 6)))
BYTES = bytes(LAYER)
N = len(BYTES)


def _entry(begin: Any, end: Any, dtype: str = "U8", shape: list[Any] | None = None) -> dict[str, Any]:
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


def framed(header: Any, data: bytes) -> bytes:
    """A file with this header: bytes as they are, or an object to become JSON, padded to a multiple of 8."""
    if not isinstance(header, bytes):
        header = json.dumps(header, separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data


def _header(name: str, rule: str, header: Any, data: bytes, field: str, at: int = 8, error: str = FORMAT) -> BrokenFile:
    return BrokenFile(name, SECTION, rule, framed(header, data), error, field, at)


def _length() -> Iterator[BrokenFile]:
    rule = "a file begins with the length of its header"
    yield BrokenFile("file-empty", SECTION, rule, b"", FORMAT, "header length", 0)
    yield BrokenFile("file-7-bytes", SECTION, rule, bytes(7), FORMAT, "header length", 0)
    good = framed({"0": _entry(0, N)}, BYTES)
    rule = "the header lies within the file"
    room = len(good) - 8
    data = (room + 1).to_bytes(8, "little") + good[8:]
    yield BrokenFile("header-past-the-end", SECTION, rule, data, FORMAT, "header length", 0)
    rule = "a header has at most 100,000,000 bytes"
    for name, length in (("too-long", 100_000_001), ("length-all-ones", 2**64 - 1)):
        data = length.to_bytes(8, "little") + good[8:]
        yield BrokenFile(f"header-{name}", SECTION, rule, data, FORMAT, "header length", 0)


def _json() -> Iterator[BrokenFile]:
    rule = "the header is a JSON object in UTF-8"
    text = json.dumps({"0": _entry(0, N)}).encode()
    yield _header("header-empty", rule, b"", BYTES, "header")
    yield _header("header-leading-space", "the header begins with '{'", b" " + text, BYTES, "header")
    yield _header("header-byte-order-mark", "the header begins with '{'", b"\xef\xbb\xbf" + text, BYTES, "header")
    yield _header("header-not-utf8", rule, b'{"\xff":0}', b"", "header", 8 + 2)
    yield _header("header-not-json", rule, b'{"0":', b"", "header", 8 + 5)
    yield _header("header-nan", rule, b'{"0":NaN}', b"", "header")
    yield _header("header-array", rule, b"[]", b"", "header")
    yield _header("header-trailing-text", rule, text + b"x", BYTES, "header", 8 + len(text))
    yield _header("header-deeply-nested", rule, b'{"0":' + b"[" * 100_000, b"", "header")
    rule = "texts are Unicode, also those that are written as escapes"
    half = b'{"\\ud800":' + json.dumps(_entry(0, N)).encode() + b"}"
    yield _header("header-half-a-character", rule, half, BYTES, "header")
    yield from _texts(rule)
    rule = "a key occurs once"
    twice = b'{"0":' + json.dumps(_entry(0, N)).encode() + b',"0":' + json.dumps(_entry(0, N)).encode() + b"}"
    yield _header("header-key-twice", rule, twice, BYTES, "header.0")
    inner = text.replace(b'"dtype": "U8"', b'"dtype": "U8", "dtype": "U8"')
    yield _header("header-dtype-twice", rule, inner, BYTES, "header.dtype")
    metadata = b'{"__metadata__":{},"__metadata__":{},' + text[1:]
    yield _header("header-metadata-twice", rule, metadata, BYTES, "header.__metadata__")
    yield _header("metadata-key-twice", rule, b'{"__metadata__":{"a":"1","a":"2"},' + text[1:], BYTES, "header.a")
    rule = "a header has at most 600,000 values"
    front, back = b'{"__metadata__":{"a":"', b'"},' + text[1:]
    commas = 600_001 - sum((front + back).count(each) for each in (b",", b"[", b"{", b"{"))
    yield _header("header-values", rule, front + b"," * commas + back, BYTES, "header")
    rule = "metadata is a map of texts"
    yield _header("metadata-number", rule, {"__metadata__": {"a": 1}, "0": _entry(0, N)}, BYTES, "__metadata__")
    yield _header("metadata-list", rule, {"__metadata__": ["a"], "0": _entry(0, N)}, BYTES, "__metadata__")


def _texts(rule: str) -> Iterator[BrokenFile]:
    """A text of the metadata that is none; the rest of the file is right."""
    front, back = b'{"__metadata__":{"a":"', b'"},"0":' + json.dumps(_entry(0, N)).encode() + b"}"
    at = 8 + len(front)
    for name, text in (
        ("low", b"\\udc00"),
        ("high-then-letter", b"\\ud800x12345"),
        ("high-then-escape", b"\\ud800\\u0041"),
        ("high-then-digits", b"\\ud800xxdc00"),
        ("high-at-the-end", b"\\ud800"),
    ):
        yield _header(f"text-half-a-character-{name}", rule, front + text + back, BYTES, "header")
    rule = "the header is a JSON object in UTF-8"
    for name, text in (
        ("continuation", b"\x80"),
        ("cut", b"\xc3"),
        ("no-continuation", b"\xc3a"),
        ("overlong2", b"\xc1\x81"),
        ("overlong3", b"\xe0\x80\x80"),
        ("half-a-pair", b"\xed\xa0\x80"),
        ("overlong4", b"\xf0\x80\x80\x80"),
        ("beyond-unicode", b"\xf4\x90\x80\x80"),
        ("five-bytes", b"\xf8\x88\x80\x80\x80"),
    ):
        yield _header(f"text-utf8-{name}", rule, front + text + back, BYTES, "header", at)
    yield _header("text-escape-unknown", rule, front + b"\\x41" + back, BYTES, "header", at)
    yield _header("text-escape-no-number", rule, front + b"\\u00g1" + back, BYTES, "header", at + 1)
    yield _header("text-control-character", rule, front + b"\x1f" + back, BYTES, "header", at)
    leading = json.dumps({"0": _entry(0, N)}).replace(f"[{N}]", f"[0{N}]").encode()
    yield _header("number-leading-zero", rule, leading, BYTES, "header", 8 + leading.index(b"[0") + 2)


def _entries() -> Iterator[BrokenFile]:
    rule = "an entry has dtype, shape and data_offsets, nothing else"
    yield _header("entry-not-an-object", rule, {"0": 5}, b"", "header.0")
    without = {key: value for key, value in _entry(0, N).items() if key != "shape"}
    yield _header("entry-without-shape", rule, {"0": without}, BYTES, "header.0")
    yield _header("entry-with-more", rule, {"0": _entry(0, N) | {"offset": 0}}, BYTES, "header.0")
    rule = "the dtype is one of safetensors"
    yield _header("entry-dtype-unknown", rule, {"0": _entry(0, N, "U9")}, BYTES, "header.0.dtype", error=UNSUPPORTED)
    yield _header("entry-dtype-number", rule, {"0": {**_entry(0, N), "dtype": 0}}, BYTES, "header.0.dtype")
    rule = "dimensions are integers from 0"
    for name, shape in (
        ("fraction", [float(N)]),
        ("text", [str(N)]),
        ("boolean", [True]),
        ("null", None),
        ("huge", [2**63]),
    ):
        entry = {"dtype": "U8", "shape": shape, "data_offsets": [0, N]}
        yield _header(f"entry-shape-{name}", rule, {"0": entry}, BYTES, "header.0.shape")
    yield _header(
        "entry-nine-dimensions", "at most 8 dimensions", {"0": _entry(0, 1, shape=[1] * 9)}, b"\0", "header.0.shape"
    )
    rule = "data_offsets are two integers, the end not before the begin"
    for name, offsets in (
        ("reversed", [N, 0]),
        ("fraction", [0, N + 0.5]),
        ("one", [0]),
        ("three", [0, N, N]),
        ("text", "0-1"),
    ):
        entry = {"dtype": "U8", "shape": [N], "data_offsets": offsets}
        yield _header(f"entry-offsets-{name}", rule, {"0": entry}, BYTES, "header.0.data_offsets")
    rule = "numbers are not negative and have at most 19 digits"
    for name, shape, offsets in (
        ("shape-negative", [-N], [0, N]),
        ("offsets-negative", [N], [-N, 0]),
        ("shape-googol", [10**100], [0, N]),
    ):
        entry = {"dtype": "U8", "shape": shape, "data_offsets": offsets}
        yield _header(f"entry-{name}", rule, {"0": entry}, BYTES, "header")
    rule = "the size follows from dtype and shape"
    yield _header("entry-size", rule, {"0": _entry(0, N, shape=[N - 1])}, BYTES, "header.0.data_offsets")
    wraps = {"dtype": "U8", "shape": [2**32, 2**32, 2], "data_offsets": [0, 0]}
    yield _header("entry-shape-wraps", rule, {"0": wraps}, b"", "header.0.data_offsets")


def _tiling() -> Iterator[BrokenFile]:
    rule = "the tensors fill the data: no overlap, no hole, nothing behind"
    two = 2 * BYTES
    cases: dict[str, tuple[dict[str, Any], bytes, str]] = {
        "overlap": ({"0": _entry(0, N), "1": _entry(N - 1, 2 * N - 1)}, two[:-1], "header.1.data_offsets"),
        "same-bytes": ({"0": _entry(0, N), "1": _entry(0, N)}, BYTES, "header.1.data_offsets"),
        "hole": ({"0": _entry(0, N), "1": _entry(N + 1, 2 * N + 1)}, BYTES + b"\0" + BYTES, "header.1.data_offsets"),
        "hole-at-the-start": ({"0": _entry(8, N + 8)}, bytes(8) + BYTES, "header.0.data_offsets"),
        "past-the-end": ({"0": _entry(0, N)}, BYTES[:-1], "header.0.data_offsets"),
    }
    for name, (header, data, field) in cases.items():
        yield _header(f"data-{name}", rule, header, data, field)
    file = framed({"0": _entry(0, N)}, BYTES)
    yield BrokenFile("data-trailing-byte", SECTION, rule, file + b"\0", FORMAT, None, len(file))


def _index() -> Iterator[BrokenFile]:
    rule = "a key is a decimal layer index"
    for name, key in (
        ("word", "lm_head"),
        ("negative", "-1"),
        ("sign", "+1"),
        ("empty", ""),
        ("space", " 1"),
        ("hexadecimal", "0x1"),
        ("other-digits", "\u0661"),
        ("too-large", "1" + "0" * 9),
    ):
        data = framed({key: _entry(0, N)}, BYTES)
        yield BrokenFile(f"key-{name}", INDEX, rule, data, FORMAT, f"header.{key}", 8)
    data = framed({"3": _entry(0, N), "03": _entry(N, 2 * N)}, 2 * BYTES)
    yield BrokenFile("index-twice", INDEX, "a layer index occurs once", data, FORMAT, None, len(data) - N)
    rule = "a blob is a U8 tensor of one dimension"
    for name, entry in (
        ("i8", _entry(0, N, "I8")),
        ("f32", _entry(0, N, "F32", [N // 2 // 4 * 2]) if N % 8 == 0 else _entry(0, N, "U16", [N // 2])),
        ("two-dimensions", _entry(0, N, shape=[1, N])),
        ("no-dimensions", _entry(0, 1, shape=[])),
    ):
        payload = BYTES[: entry["data_offsets"][1]]
        data = framed({"0": entry}, payload)
        yield BrokenFile(f"blob-{name}", INDEX, rule, data, FORMAT, None, len(data) - len(payload))
    for name, key, missing in (
        ("version", "uqff.version.major", "uqff.version.minor"),
        ("layer", "model.layers.0.mlp.up_proj.weight.format", "uqff.version.major"),
    ):
        data = framed({key: _entry(0, N)}, BYTES)
        rule = "a file of UQFF 1.x states its version in three entries"
        yield BrokenFile(f"uqff-1-{name}", INDEX, rule, data, FORMAT, missing, 8)
    rule = "errors within a blob are placed in the file"
    blob = LAYER.replaced({"bias_flag": b"\x02"})
    data = framed({"0": _entry(0, N), "1": _entry(N, 2 * N)}, BYTES + bytes(blob))
    at = len(data) - N + blob.offset("bias_flag")
    yield BrokenFile("blob-broken-in-file", INDEX, rule, data, FORMAT, "bias_flag", at)
    data = framed({"0": _entry(0, 0, shape=[0])}, b"")
    yield BrokenFile("blob-empty-in-file", INDEX, "a blob has a header", data, FORMAT, "version", len(data))


def _foreign() -> Iterator[BrokenFile]:
    rule = "a file of another kind is named as what it is"
    digest = "4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393"
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{digest}\nsize 12345\n"
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as zipped:
        zipped.writestr(zipfile.ZipInfo("archive/data.pkl", (1980, 1, 1, 0, 0, 0)), b"")
    kinds = {
        "git-lfs-pointer": pointer.encode(),
        "html-page": b"<!DOCTYPE html>\n<html><head><title>Sign in</title></head><body></body></html>\n",
        "zip-archive": archive.getvalue(),
        "pickle": pickle.dumps({"weight": [1.0, 2.0]}, protocol=2),
        "gguf-file": b"GGUF" + (3).to_bytes(4, "little") + bytes(16),
        "gzip-archive": bytes.fromhex("1f8b08000000000000ff") + bytes(16),
        "json-document": b'{"error": "Repository not found"}\n',
        "xml-document": b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>\n',
    }
    for name, data in kinds.items():
        yield BrokenFile(name, FOREIGN, rule, data, FORMAT, None, 0)


class SoundFile(NamedTuple):
    """A valid file; ``keys`` in the order of the layer index."""

    name: str
    note: str
    data: bytes
    keys: tuple[str, ...]


def sound() -> Iterator[SoundFile]:
    """Valid files, among them near misses of the broken ones."""
    blobs = [bytes(unquant(tensor("F32", 2, n, data=_c.numbers("F32", 2 * n)))) for n in range(1, 13)]

    def tiled(keys: list[str], metadata: dict[str, str] | None = None) -> bytes:
        header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
        at = 0
        for key in keys:
            size = len(blobs[int(key)])
            header[key] = _entry(at, at + size)
            at += size
        return framed(header, b"".join(blobs[int(key)] for key in keys))

    numbers = [str(n) for n in range(12)]
    yield SoundFile("one-layer", "the smallest file", tiled(["0"]), ("0",))
    yield SoundFile("twelve-layers", "keys sorted as texts, as writers do", tiled(sorted(numbers)), tuple(numbers))
    yield SoundFile("data-in-index-order", "the order of the data is free", tiled(numbers), tuple(numbers))
    yield SoundFile("leading-zeros", "03 is index 3", tiled(["03", "001"]), ("001", "03"))
    yield SoundFile("gap-in-indices", "a shard has a part of the indices", tiled(["5", "7"]), ("5", "7"))
    yield SoundFile("metadata", "metadata may be there; it means nothing", tiled(["0"], {"format": "pt"}), ("0",))
    loose = json.dumps({"0": _entry(0, len(blobs[0]))}, indent=1).encode()
    yield SoundFile("header-not-padded", "white space within the object is free", framed(loose, blobs[0]), ("0",))
    yield SoundFile("no-layers", "an empty file is a file", framed({}, b""), ())


def sound_files() -> dict[str, bytes]:
    """``container/NAME.uqff`` and ``container/index.json``."""
    found, index = {}, []
    for file in sound():
        found[f"container/{file.name}.uqff"] = file.data
        begin = 8 + int.from_bytes(file.data[:8], "little")
        header = json.loads(file.data[8:begin])
        layers = []
        for key in file.keys:
            first, last = (begin + at for at in header[key]["data_offsets"])
            digest = hashlib.sha256(file.data[first:last]).hexdigest()
            layers.append({"key": key, "index": int(key), "offset": first, "size": last - first, "sha256": digest})
        index.append({"file": f"{file.name}.uqff", "note": file.note, "layers": layers})
    rows = ",\n".join(f" {json.dumps(row)}" for row in index)
    found["container/index.json"] = f"[\n{rows}\n]\n".encode()
    return found


def broken() -> Iterator[BrokenFile]:
    """All of them."""
    for cases in (_length, _json, _entries, _tiling, _index, _foreign):
        yield from cases()
