"""The kind of a file by its first bytes: a kind that the readers can open, or another that people often give."""

from __future__ import annotations

from pathlib import Path

_ZIP, _NUMPY, _PICKLE = b"PK\x03\x04", b"\x93NUMPY", b"\x80"
_HEAD = 512
_TAR, _TAR_AT = b"ustar", 257
_OTHERS: tuple[tuple[bytes, str], ...] = (
    (b"version https://git-lfs", "a Git LFS pointer; fetch the file itself with 'git lfs pull' or 'hf download'"),
    (b"\x1f\x8b", "a gzip archive; unpack it first"),
    (b"\xfd7zXZ", "an xz archive; unpack it first"),
    (b"BZh", "a bzip2 archive; unpack it first"),
    (b"\x28\xb5\x2f\xfd", "a Zstandard archive; unpack it first"),
    (b"7z\xbc\xaf", "a 7z archive; unpack it first"),
    (b"Rar!", "a RAR archive; unpack it first"),
    (b"GGUF", "a GGUF file, which holds a model and no prefix; give it to --model"),
    (b"\x89HDF", "an HDF5 file; save the state dict as safetensors where it was made"),
)
_PAGES = (b"<!doctype", b"<html", b"<?xml", b"<head")
_JSON = (b"{", b"[")


def kind(path: Path) -> str | None:
    """The kind of a file: `"safetensors"`, `"zip"`, `"pickle"` or `"numpy"`, or None for another kind."""
    with path.open("rb") as file:
        first = file.read(9)
    for start, name in ((_ZIP, "zip"), (_NUMPY, "numpy")):
        if first.startswith(start):
            return name
    # A safetensors file begins with a length, whose first byte may equal the first byte of a pickle.
    if first[8:] == b"{" and int.from_bytes(first[:8], "little") <= path.stat().st_size:
        return "safetensors"
    return "pickle" if first.startswith(_PICKLE) else None


def other_kind(path: Path) -> str | None:
    """Name the kind of a file that no reader opens, and say what to do; None if the bytes are of no known kind."""
    with path.open("rb") as file:
        head = file.read(_HEAD)
    if not head:
        return "an empty file; download or save it again"
    for start, advice in _OTHERS:
        if head.startswith(start):
            return advice
    if head[_TAR_AT:].startswith(_TAR):
        return "a tar archive; unpack it first"
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith(_PAGES):
        return "a web page, such as a login or error page that was saved in its place; download the file again"
    if text.startswith(_JSON) and path.suffix == ".json":
        return "a configuration; name the file of tensors beside it, or the folder"
    return None
