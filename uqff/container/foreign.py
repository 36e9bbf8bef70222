"""What a file is that claims to be UQFF and is not: the usual accidents, by their first bytes."""

from __future__ import annotations

__all__ = ["identify"]

_MAGICS = (
    (b"version https://git-lfs", "a Git LFS pointer; fetch the real file with `git lfs pull`"),
    (b"GGUF", "a GGUF file, which uqff inspect, plan, convert, quantize and run take"),
    (b"PK\x03\x04", "a zip archive (a PyTorch checkpoint is one)"),
    (b"PK\x05\x06", "an empty zip archive"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"\x89HDF", "an HDF5 file"),
    (b"\x7fELF", "an executable"),
)


def identify(head: bytes) -> str | None:
    """Name the kind of a foreign file.

    Args:
        head: the first bytes of the file, 512 are enough.

    Returns:
        A phrase such as ``a Git LFS pointer; ...``, or None if nothing is recognised.
    """
    for magic, name in _MAGICS:
        if head.startswith(magic):
            return name
    if len(head) > 2 and head[0] == 0x80 and 2 <= head[1] <= 5:
        return "a Python pickle (which is not opened: unpickling runs code)"
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype html", b"<html", b"<head")):
        return "an HTML page (a download that needs a login, perhaps)"
    if text.startswith((b"<?xml", b"<error")):
        return "an XML document (an error message of a server, perhaps)"
    if text.startswith((b"{", b"[")):
        return "a JSON document"
    return None
