"""Event streams: any split of the bytes gives the same events; what is no stream is refused."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.http.sse import MAX_EVENT_BYTES, EventParser, MalformedStream


def read(*pieces: bytes) -> tuple[list[bytes], str | None]:
    """Events of one parser that is fed these pieces, and what it refused."""
    parser = EventParser()
    events: list[bytes] = []
    for piece in pieces:
        try:
            events += parser.feed(piece)
        except MalformedStream as error:
            return events + error.events, str(error)
    return events, None


def split(stream: bytes, cuts: list[int]) -> list[bytes]:
    places = sorted({min(cut, len(stream)) for cut in cuts} | {0, len(stream)})
    return [stream[begin:end] for begin, end in pairwise(places)]


LINES = st.sampled_from(
    [
        "data: {}", "data:x", "data: ü€😀", "data", "data:", "data:  two", ": comment", ":", "event: message",
        "id: 7", "retry: 10", "", "", "", "<html>", "dta: x", '{"a": 1}',
    ]
)  # fmt: skip
ENDS = st.sampled_from([b"\n", b"\n", b"\r\n", b"\r"])
STREAMS = st.lists(st.tuples(LINES, ENDS), max_size=12).map(
    lambda lines: b"".join(line.encode() + end for line, end in lines)
)


@given(stream=STREAMS, bom=st.sampled_from([b"", b"\xef\xbb\xbf"]), cuts=st.lists(st.integers(0, 120), max_size=8))
def test_any_split_of_a_stream_gives_the_same_events(stream: bytes, bom: bytes, cuts: list[int]) -> None:
    assert read(*split(bom + stream, cuts)) == read(bom + stream)


@given(stream=STREAMS)
def test_byte_by_byte(stream: bytes) -> None:
    assert read(*(bytes([byte]) for byte in stream)) == read(stream)


@given(
    events=st.lists(
        st.lists(st.text(st.characters(exclude_characters="\r\n", codec="utf-8")), min_size=1, max_size=3), max_size=5
    ),
    end=st.sampled_from(["\n", "\r\n", "\r"]),
    space=st.sampled_from(["", " "]),
    cuts=st.lists(st.integers(0, 120), max_size=8),
)
def test_what_is_written_is_read(events: list[list[str]], end: str, space: str, cuts: list[int]) -> None:
    lines = [[f"data:{space}{line}" for line in event] for event in events]
    stream = "".join(end.join([*event, "", ""]) for event in lines).encode()
    # Without a space before it, a value's own first space is taken for one.
    wanted = ["\n".join(line if space else line.removeprefix(" ") for line in event) for event in events]
    assert read(*split(stream, cuts)) == ([event.encode() for event in wanted], None)


@pytest.mark.parametrize(
    ("stream", "events"),
    [
        (b"data: a\n\n", [b"a"]),
        (b"data: a\n\ndata: b\n\n", [b"a", b"b"]),
        (b"data: a\ndata: b\n\n", [b"a\nb"]),
        (b"data: a\n\ndata: b\ndata: c\n\ndata: d\n\n", [b"a", b"b\nc", b"d"]),
        (b"data: a\r\n\r\ndata: b\n\n", [b"a", b"b"]),
        (b"data: a\r\rdata: b\r\r", [b"a", b"b"]),
        (b"data: a\rdata: b\n\n", [b"a\nb"]),
        (b"\xef\xbb\xbfdata: a\n\n", [b"a"]),
        (b": ping\n\ndata: a\n\n", [b"a"]),
        (b"event: x\nid: 1\nretry: 5\ndata: a\n\n", [b"a"]),
        (b"event: x\n\n", []),
        (b"data\n\n", [b""]),
        (b"data: \n\n", [b""]),
        (b"data:a\n\n", [b"a"]),
        (b"data: data: a\n\n", [b"data: a"]),
        # The event is not over.
        (b"data: a\n", []),
        (b"data: a", []),
    ],
)
def test_events_of_a_stream(stream: bytes, events: list[bytes]) -> None:
    assert read(stream) == (events, None)


@pytest.mark.parametrize("line", [b"<html>", b'{"error": "x"}', b"plain text", b"Data: x", b" data: x", b"data : x"])
def test_a_line_that_is_no_field_is_refused_and_shown(line: bytes) -> None:
    events, refused = read(b"data: a\n\n" + line + b"\n")
    assert events == [b"a"]
    assert refused is not None
    assert line.decode() in refused


def test_a_bom_belongs_to_the_start_only() -> None:
    events, refused = read(b"data: a\n\n", b"\xef\xbb\xbfdata: b\n\n")
    assert events == [b"a"]
    assert refused is not None


@pytest.mark.parametrize("data", [b"data: \xff\n\n", b"data: \xe2\x82\n\n", b": \xff\n", b"data: a\n\ndata: \xff\n\n"])
def test_bytes_that_are_no_utf8_are_refused(data: bytes) -> None:
    events, refused = read(data)
    assert events == [b"a"] * data.startswith(b"data: a")
    assert refused is not None
    assert "UTF-8" in refused


@pytest.mark.parametrize("piece_bytes", [1 << 16, 1 << 30])
@pytest.mark.parametrize("head", [b"data: ", b": ", b""])
def test_a_line_without_end_is_refused(head: bytes, piece_bytes: int) -> None:
    stream = head + b"x" * (MAX_EVENT_BYTES + 1)
    assert "more than" in str(read(*split(stream, list(range(0, len(stream), piece_bytes))))[1])


@pytest.mark.parametrize("end", [b"\n\n", b"\r\n\r\n"])
def test_an_event_of_the_limit_is_read_and_a_longer_one_refused(end: bytes) -> None:
    half = b"data:" + b"x" * (MAX_EVENT_BYTES // 2)
    line_end = end[: len(end) // 2]
    events, refused = read(half + line_end + half + end)
    assert refused is None
    assert [len(event) for event in events] == [MAX_EVENT_BYTES + 1]
    assert read(half + line_end + half + b"x" + end)[1] is not None
