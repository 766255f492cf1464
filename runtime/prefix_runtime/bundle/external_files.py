"""The files of weights that an ONNX graph names, read from its bytes: the runtime does without the onnx package.

Only what leads to tensors is looked at. Everything else, the weights inside of the graph first, is skipped by its
length, so this takes steps for each node and not for each number.

Source: onnx/onnx.proto of ONNX 1.19, and the encoding of protocol buffers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_MOST_DEPTH = 100
"""Graphs inside of each other, as protocol buffers' own readers limit messages."""

_Message = Mapping[int, str]
# For each message the fields that lead to tensors, by number: the kind of message that they hold.
_FIELDS: Mapping[str, _Message] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
}
_LOCATION = b"location"


def external_files(graph: bytes) -> set[str]:
    """The files that the tensors of a serialized ONNX model lie in, as the model names them: relative to its folder.

    Raises:
        ValueError: the bytes are no message, or graphs are nested too deep.
    """
    names: set[str] = set()
    waiting = [("model", memoryview(graph), 0)]
    while waiting:
        kind, message, depth = waiting.pop()
        if depth > _MOST_DEPTH:
            raise ValueError(f"messages more than {_MOST_DEPTH} deep")
        for number, content in _fields(message):
            inner = _FIELDS[kind].get(number)
            if inner == "entry":
                names |= _location(content)
            elif inner is not None:
                waiting.append((inner, content, depth + 1))
    return names


def _location(entry: memoryview) -> set[str]:
    """What an entry of `external_data` names, if it is a location."""
    fields = {number: bytes(content) for number, content in _fields(entry)}  # of a field that comes twice the last
    return {fields.get(2, b"").decode()} if fields.get(1) == _LOCATION else set()


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Number and content of each field that has a length; others are passed over."""
    place = 0
    while place < len(message):
        tag, place = _varint(message, place)
        number, wire = tag >> 3, tag & 7
        if wire == _VARINT:
            _, place = _varint(message, place)
        elif wire == _BYTES:
            length, start = _varint(message, place)
            place = start + length
            if place <= len(message):
                yield number, message[start:place]
        elif wire in (_FIXED64, _FIXED32):
            place += 8 if wire == _FIXED64 else 4
        else:
            raise ValueError(f"a field of kind {wire} at byte {place}")
    if place > len(message):
        raise ValueError("a message that ends within a field")


def _varint(message: memoryview, place: int) -> tuple[int, int]:
    """A number of variable length, and where what follows begins."""
    value = shift = 0
    while place < len(message) and shift < 70:
        byte = message[place]
        value |= (byte & 0x7F) << shift
        place, shift = place + 1, shift + 7
        if byte < 0x80:
            return value, place
    raise ValueError(f"a number without an end at byte {place}")
