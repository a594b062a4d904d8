"""Members of a JSON document of any length, however it is split (contract C1): the same as a decoder finds in the whole."""

import itertools
import json
import re
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptutor.openrouter.json_members import KEY_BYTES_MAX, VALUE_BYTES_MAX, MemberReader, Path

PATHS: tuple[Path, ...] = (("usage",), ("id",), ("response", "usage"), ("response", "error"))
NAMES = st.sampled_from(["usage", "id", "response", "error", "output", 'us"age', "usage\\", "", "é", "\U0001f600"])
TEXTS = st.sampled_from(['{"usage": 1}', '"usage":', "\\", '\\"', "}", "]", ",", ":", "plain", "я", '\\",\n"id":'])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.floats(allow_nan=False, allow_infinity=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES, inner, max_size=4),
    max_leaves=12,
)


def members(document: Any, paths: tuple[Path, ...] = PATHS) -> dict[Path, Any]:
    found = {}
    for path in paths:
        value = document
        for name in path:
            value = value.get(name, members) if isinstance(value, dict) else members
        if value is not members:
            found[path] = value
    return found


def read(pieces: list[bytes]) -> MemberReader:
    reader = MemberReader(PATHS)
    for piece in pieces:
        reader.feed(piece)
    return reader


def split(document: bytes, places: list[int]) -> list[bytes]:
    ends = [0, *sorted(place % (len(document) + 1) for place in places), len(document)]
    return [document[start:end] for start, end in itertools.pairwise(ends)]


@given(
    st.dictionaries(NAMES, VALUES, max_size=5),
    st.booleans(),
    st.sampled_from([None, 1]),
    st.lists(st.integers(0, 10_000), max_size=8),
)
def test_what_is_found_is_what_a_decoder_finds(
    document: dict[str, Any], ascii_only: bool, indent: int | None, places: list[int]
) -> None:
    encoded = json.dumps(document, ensure_ascii=ascii_only, indent=indent).encode()
    reader = read(split(encoded, places))
    assert reader.is_whole
    assert {path: json.loads(value) for path, value in reader.values.items()} == members(document)


def test_every_split_of_one_document() -> None:
    document = (
        rb' { "a" : [ {"usage":1}, "\"usage\":2" ], "response":{"x":{},"usage" : {"cost":1.20e-7,"n":[1]} },"id":"g\u0065n" } '
    )
    two_pieces = [[document[:at], document[at:]] for at in range(len(document) + 1)]
    for pieces in [*two_pieces, [document[at : at + 1] for at in range(len(document))]]:
        reader = read(pieces)
        assert reader.is_whole
        assert reader.values == {("response", "usage"): b'{"cost":1.20e-7,"n":[1]}', ("id",): rb'"g\u0065n"'}


def test_the_last_of_several_members_with_one_name_counts() -> None:
    assert read([b'{"id":1,"id":2}']).values == {("id",): b"2"}
    assert read([b'{"response":{"usage":1},"response":{"usage":2}}']).values == {("response", "usage"): b"2"}
    assert read([b'{"id":1,"id":"%s"}' % (b"x" * VALUE_BYTES_MAX)]).values == {}


def test_an_escaped_name_is_the_same_name() -> None:
    assert read([rb'{"us\u0061ge":1}']).values == {("usage",): b"1"}


def test_a_name_that_is_no_text_is_another_name() -> None:
    assert read([b'{"\xff":1,"\\ud800":2,"id":3}']).values == {("id",): b"3"}


@pytest.mark.parametrize("filler", [b"A", rb"\"", rb"\\", rb"\u0022", b"{", b"}]"])
def test_memory_is_bounded_by_what_is_wanted(filler: bytes) -> None:
    """The end of an image: base64 or text of any length, then the bill."""
    reader = MemberReader(PATHS)
    reader.feed(b'{"image":"')
    for _ in range(64):
        reader.feed(filler * (65_536 // len(filler)))
        assert sum(len(value) for value in reader.values.values()) == 0
        assert reader._kept is None
    reader.feed(b'","usage":{"cost":0.5}}')
    assert (reader.is_whole, reader.values) == (True, {("usage",): b'{"cost":0.5}'})


def test_a_name_or_a_wanted_value_that_is_too_long_is_not_kept() -> None:
    reader = read([b'{"usage":"', b"x" * VALUE_BYTES_MAX, b'","' + b"k" * KEY_BYTES_MAX, b'":1,"id":2}'])
    assert (reader.is_whole, reader.values) == (True, {("id",): b"2"})


@pytest.mark.parametrize(
    "document",
    [b"", b" ", b"[1]", b'"usage"', b"1", b'{"id":1', b'{"id":1}]', b'{"id":1}}', b'{"id":1}{"id":2}', b'{"id":1} x', b"x{}", b'{"id"]'],
)  # fmt: skip
def test_what_is_not_one_object_is_not_whole(document: bytes) -> None:
    for at in range(len(document) + 1):
        assert not read([document[:at], document[at:]]).is_whole


@given(st.binary(max_size=200), st.integers(0, 200))
def test_any_bytes_are_read_without_an_error(document: bytes, at: int) -> None:
    one, two = read([document]), read([document[:at], document[at:]])
    assert (one.is_whole, one.values) == (two.is_whole, two.values)
    try:
        is_object = isinstance(orjson.loads(document), dict)
    except orjson.JSONDecodeError:
        return
    assert one.is_whole is is_object or re.match(rb"\s*\{", document)
