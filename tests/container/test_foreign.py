"""The usual accidents: what people pass for a UQFF file."""

from __future__ import annotations

import gzip
import io
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest

import uqff
from tests.support.samples import BLOB, file_of
from uqff import FormatError
from uqff.container.foreign import identify


def zipped() -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        archive.writestr("data.pkl", b"x")
    return target.getvalue()


def saved_array() -> bytes:
    target = io.BytesIO()
    np.save(target, np.zeros(9))
    return target.getvalue()


FOREIGN = [
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "a Git LFS pointer"),
    (b"GGUF\3\0\0\0" + bytes(16), "a GGUF file, which uqff inspect, plan, convert, quantize and run take"),
    (zipped(), "a zip archive"),
    (b"PK\5\6" + bytes(18), "an empty zip archive"),
    (gzip.compress(b"text"), "a gzip archive"),
    (saved_array(), "a NumPy array"),
    (b"\x89HDF\r\n\x1a\n" + bytes(8), "an HDF5 file"),
    (b"\x7fELF\2\1\1" + bytes(9), "an executable"),
    (pickle.dumps({"weight": [1, 2, 3]}), "a Python pickle"),
    (pickle.dumps({"weight": [1, 2, 3]}, protocol=2), "a Python pickle"),
    (b"<!DOCTYPE html><html></html>", "an HTML page"),
    (b"\n\n  <html><body>Sign in</body></html>", "an HTML page"),
    (b"<?xml version='1.0'?><Error/>", "an XML document"),
    (b"<Error><Code>AccessDenied</Code></Error>", "an XML document"),
    (b'{"error": "Repository not found"}', "a JSON document"),
    (b'\xef\xbb\xbf[{"a": 1}]', "a JSON document"),
]


@pytest.mark.parametrize(("data", "name"), FOREIGN, ids=[name for _, name in FOREIGN])
def test_foreign_file_is_named(data: bytes, name: str, tmp_path: Path) -> None:
    """The message says what the file is, not which of its bytes was read as a length."""
    path = tmp_path / "model.uqff"
    path.write_bytes(data)
    with pytest.raises(FormatError, match=f"not a UQFF file: {name}") as caught:
        uqff.open(path)
    assert caught.value.file == str(path)


def test_unknown_bytes_are_not_guessed() -> None:
    """No name is better than a wrong one."""
    assert identify(b"") is None
    assert identify(bytes(512)) is None
    assert identify(file_of({"0": BLOB})[:512]) is None
    assert identify(b"\x80\x09\x00") is None


def test_pickle_is_not_run(tmp_path: Path) -> None:
    """Unpickling runs code; the file is recognised by two bytes."""

    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",))

    (tmp_path / "model.uqff").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(FormatError, match="pickle"):
        uqff.open(tmp_path / "model.uqff")
    assert not (tmp_path / "ran").exists()
