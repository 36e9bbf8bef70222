"""``uqff.ksy`` at work: compiled by Kaitai Struct's compiler, its classes read all valid vectors.

The compiler (npm's ``kaitai-struct-compiler``, run by node) and the runtime (PyPI's ``kaitaistruct``) go to
``.venvs/kaitai``.  Where one of them cannot be had, the vectors are counted as not run.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
import subprocess
import sys
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import yaml

from tools.schemas.fields import BLOCKS, DTYPES, OF_DTYPE, Field, fields_of

ROOT: Final = Path(__file__).resolve().parents[2]
SCHEMAS: Final = ROOT / "spec" / "schemas"
VECTORS: Final = ROOT / "spec" / "vectors"
TOOLS: Final = ROOT / ".venvs" / "kaitai"

COMPILER: Final = "kaitai-struct-compiler@0.11.0"
RUNTIME: Final = "kaitaistruct==0.11"

_STRUCT: Final = {
    "u1": "B", "s1": "b", "u2": "H", "s2": "h", "u4": "I", "s4": "i", "s8": "q", "f4": "f", "f8": "d",
}  # fmt: skip


class Row(NamedTuple):
    """A vector, and what is wrong with what the schema makes of it; nothing if ``problem`` is None."""

    vector: str
    problem: str | None


def install() -> bool:
    """Get compiler and runtime, once; whether both are there."""
    if (TOOLS / "ready").exists():
        return shutil.which("node") is not None
    npm = shutil.which("npm")
    if npm is None or shutil.which("node") is None:
        return False
    TOOLS.mkdir(parents=True, exist_ok=True)
    for command in (
        [npm, "pack", "--silent", COMPILER],
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", "runtime", RUNTIME],
    ):
        if subprocess.run(command, cwd=TOOLS, capture_output=True, check=False).returncode:
            return False
    archive = next(TOOLS.glob("*.tgz"), None)
    if archive is None:
        return False
    with tarfile.open(archive) as packed:
        member = packed.getmember("package/kaitai-struct-compiler.js")
        source = packed.extractfile(member)
        if source is None:
            return False
        (TOOLS / "kaitai-struct-compiler.js").write_bytes(source.read())
    (TOOLS / "ready").touch()
    return True


def compiled(text: str) -> dict[str, Any]:
    """The names of the module that the compiler makes of a schema.

    Raises:
        subprocess.CalledProcessError: it does not compile, which its ``stderr`` explains.
    """
    command = ["node", str(Path(__file__).with_name("compile.js")), str(TOOLS)]
    document = json.dumps(yaml.safe_load(text))
    done = subprocess.run(command, input=document, capture_output=True, text=True, check=True)
    if str(TOOLS / "runtime") not in sys.path:
        sys.path.append(str(TOOLS / "runtime"))
    names: dict[str, Any] = {}
    exec(compile(json.loads(done.stdout)["uqff.py"], "uqff.py", "exec"), names)
    return names


def check_all() -> list[Row] | None:
    """Every valid vector of a reader, read; None where the compiler cannot be had."""
    if not install():
        return None
    reader = Reader(compiled((SCHEMAS / "uqff.ksy").read_text("utf-8")))
    index = json.loads((VECTORS / "index.json").read_text("utf-8"))
    return [Row(case["id"], reader.problem(case)) for case in index if case["outcome"] == "accept"]


def report(rows: list[Row] | None) -> list[str]:
    """What to print of it."""
    if rows is None:
        index = json.loads((VECTORS / "index.json").read_text("utf-8"))
        idle = sum(case["outcome"] == "accept" for case in index)
        return [f"no Kaitai Struct compiler: {idle} vectors not run with spec/schemas/uqff.ksy"]
    wrong = [f"{row.vector}: {row.problem}" for row in rows if row.problem is not None]
    return [*wrong, f"spec/schemas/uqff.ksy: {len(rows)} vectors, {len(wrong)} differ"]


class _Wrong(Exception):
    """What the schema makes of a vector is not what the vector says."""


class Reader:
    """The compiled classes, and how a vector is read with them.

    Args:
        names: what :func:`compiled` gives.
    """

    def __init__(self, names: Mapping[str, Any]) -> None:
        self.uqff, self.stream, self.bytes_io = names["Uqff"], names["KaitaiStream"], names["BytesIO"]
        self.failures = (_Wrong, EOFError, ValueError, AttributeError, names["kaitaistruct"].KaitaiStructError)
        self.entries = json.loads((SCHEMAS / "entries.json").read_text("utf-8"))
        self.codes = {dtype.safetensors: dtype.code for dtype in DTYPES if dtype.storable}

    def problem(self, case: Mapping[str, Any]) -> str | None:
        """What is wrong about a case."""
        described = json.loads((VECTORS / case["description"]).read_text("utf-8"))
        paths = [VECTORS / file for file in case["files"]]
        try:
            if paths[0].suffix == ".bin":
                self.blob(paths[0].read_bytes(), described["fields"])
            elif isinstance(described, list):
                (layers,) = (each["layers"] for each in described if each["file"] == paths[0].name)
                self.blobs(paths[0], layers)
            else:
                self.model([path.read_bytes() for path in paths], described)
        except self.failures as error:
            return f"{type(error).__name__}: {error}"
        return None

    def made(self, name: str, raw: bytes, *arguments: Any) -> Any:
        """One type, which takes all bytes."""
        stream = self.stream(self.bytes_io(raw))
        value = getattr(self.uqff, "".join(word[0].upper() + word[1:] for word in name.split("_")))(*arguments, stream)
        if "values" in dir(value) and not stream.is_eof():
            return value  # a payload, which is read when its numbers are asked for
        if not stream.is_eof():
            raise _Wrong(f"{name}: {stream.size() - stream.pos()} bytes are left")
        return value

    def blob(self, raw: bytes, fields: Iterable[Mapping[str, Any]]) -> None:
        """Every field that a vector describes has its value, and every payload its bytes."""
        blob = self.made("blob", raw)
        seen = 0
        for field in fields:
            stored = raw[field["offset"] : field["offset"] + field["size"]]
            holder = blob if field["path"] in ("version", "quant_type") else blob.body
            *outer, name = field["path"].split(".")
            for each in outer:
                holder = getattr(holder, each)
            value = getattr(holder, name)
            if "value" in field and value != field["value"]:
                raise _Wrong(f"{field['path']}: {value} instead of {field['value']}")
            if "value" not in field and self.packed(value) != stored:
                raise _Wrong(f"{field['path']}: other bytes")
            if "means" in field and field["type"] != "version" and value.name != field["means"].lower():
                raise _Wrong(f"{field['path']}: {value.name} instead of {field['means']}")
            seen += field["size"]
        if seen != len(raw):
            raise _Wrong(f"{seen} bytes instead of {len(raw)}")

    def blobs(self, path: Path, layers: Iterable[Mapping[str, Any]]) -> None:
        """A file's blobs, one behind the other, are its layers."""
        raw = path.read_bytes()
        file = self.uqff(self.stream(self.bytes_io(raw)))
        at, begin, found = 0, 8 + file.len_header, []
        for blob in file.data.blobs if begin < len(raw) else []:
            size = self.size_of(raw[begin + at :], blob)
            found.append(hashlib.sha256(raw[begin + at : begin + at + size]).hexdigest())
            at += size
        wanted = [each["sha256"] for each in sorted(layers, key=lambda each: each["offset"])]
        if found != wanted or begin + at != len(raw):
            raise _Wrong("the blobs are not the layers")

    def size_of(self, raw: bytes, blob: Any) -> int:
        """How many bytes a blob takes."""
        stream = self.stream(self.bytes_io(raw))
        type(blob)(stream)
        return int(stream.pos())

    def model(self, files: list[bytes], described: Mapping[str, Any]) -> None:
        """Every entry of a layer, and the version, is read by the type that ``entries.json`` names."""
        kinds = {each["name"]: each for each in self.entries["of_files"]}
        families = {layer["key"]: layer["family"] for layer in described["layers"]}
        for each in self.entries["families"]:
            for key in (key for key, family in families.items() if family == each["name"]):
                for entry in (*each["entries"], *self.entries["of_all_layers"]):
                    kinds[f"{key}.{entry['suffix']}"] = entry
        types = {
            entry["name"].removesuffix(".weight.dtype"): entry["value"]
            for entry in described["entries"]
            if entry["name"].endswith(".weight.dtype")
        }
        for entry in described["entries"]:
            declared = kinds.pop(entry["name"], None)
            raw = files[entry["file"]][entry["offset"] : entry["offset"] + entry["size"]]
            if declared is None:
                continue  # of no layer
            if entry["dtype"] not in declared["dtypes"]:
                raise _Wrong(f"{entry['name']}: {entry['dtype']}")
            key = entry["name"].removesuffix(".weight")
            codes = {
                "numbers": lambda entry=entry: [self.uqff.Dtype(self.codes[entry["dtype"]])],
                "ggml_blocks": lambda key=key: [self.uqff.GgmlType(types[key])],
            }
            arguments = codes.get(declared["kaitai"], list)()
            value = self.made(declared["kaitai"], raw, *arguments)
            if hasattr(value, "values") and declared["kaitai"] != "dimensions":
                if self.packed(value) != raw:
                    raise _Wrong(f"{entry['name']}: other bytes")
            elif "value" in entry:
                got = getattr(value, "value", None) if declared["kaitai"] != "dimensions" else value.values
                if got != entry["value"]:
                    raise _Wrong(f"{entry['name']}: {got} instead of {entry['value']}")
        missing = [name for name in kinds if not name.endswith(".bias")]
        if missing:
            raise _Wrong(f"no {missing}")

    def packed(self, payload: Any) -> bytes:
        """The bytes of a payload, put together again from its numbers, or the fields of its blocks."""
        name = type(payload).__name__
        if name == "Numbers":
            number = {dtype.code: OF_DTYPE[dtype] for dtype in DTYPES if dtype.storable}[int(payload.code)]
            return struct.pack(f"<{len(payload.values)}{_STRUCT[number]}", *payload.values)
        kind = "f8q8" if name == "F8q8Blocks" else payload.code.name
        fields = fields_of(BLOCKS[kind])
        return b"".join(self.number_bytes(block, field) for block in payload.values for field in fields)

    def number_bytes(self, block: Any, field: Field) -> bytes:
        """The bytes of a field of a block."""
        value = getattr(block, field.name)
        numbers = value if isinstance(value, list) else [value]
        return struct.pack(f"<{len(numbers)}{_STRUCT[field.number]}", *numbers)
