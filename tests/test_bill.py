"""The scanner: every split of a stream gives the same bill (contract A3, C6; rows money-9 to money-11, upstream-10, -15)."""

import itertools
import json
import re
from decimal import Decimal

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gptutor.openrouter.bill import EVENT_BYTES_MAX, BillScanner, parse_usd, read_usage_report

USAGE = {"prompt_tokens": 7, "completion_tokens": 3, "cost": 9.3e-05, "is_byok": False}
FINAL = b"data: " + json.dumps({"id": "gen-1", "choices": [], "usage": USAGE}).encode()


def scan(*chunks: bytes) -> BillScanner:
    scanner = BillScanner()
    for chunk in chunks:
        scanner.feed(chunk)
    scanner.finish()
    return scanner


def cut(stream: bytes, places: list[int]) -> list[bytes]:
    edges = sorted({0, len(stream), *(place % (len(stream) + 1) for place in places)})
    return [stream[start:end] for start, end in itertools.pairwise(edges)]


line_ends = st.sampled_from([b"\n", b"\r\n", b"\r"])
texts = st.one_of(
    st.text(alphabet='aя 🙂"\\{}:,\n\r\u2028', max_size=20),
    st.sampled_from(['{"usage":{"cost":0}}', 'data: {"usage":{"cost":0}}\n\n', "data: [DONE]", '"usage"', "\\", '\\"usage\\"']),
)
costs = st.decimals(min_value=0, max_value=99_999, places=12)


@st.composite
def streams(draw: st.DrawFn) -> tuple[bytes, Decimal | None]:
    """A stream in any valid format, and the cost that its last bill states."""
    end = draw(line_ends)
    cost = None
    parts = []
    for kind in draw(
        st.lists(st.sampled_from(["text", "comment", "bill", "bad bill", "split bill", "nested", "done"]), max_size=8)
    ):
        event = {"id": "gen-1", "choices": [{"delta": {"content": draw(texts)}}]}
        if kind == "comment":
            parts.append(b": OPENROUTER PROCESSING" + end)
        elif kind == "done":
            parts.append(b"data: [DONE]" + end)
        elif kind == "nested":
            parts.append(b"data: " + json.dumps({**event, "x": {"usage": {"cost": 5}}}).encode() + end)
        elif kind == "bad bill":
            bad = draw(st.sampled_from(["null", "-1", '"0.5"', "1e400", "1E9", "true", "{}", "[1]", "0x1", "9" * 70]))
            parts.append(b'data: {"usage":{"cost":' + bad.encode() + b"}}" + end)
        else:
            document = json.dumps(event).encode()
            if kind != "text":
                cost = draw(costs)
                document = document[:-1] + b', "usage": {"cost": %s}}' % str(cost).encode()
            if kind == "split bill":  # one JSON value over several data lines
                document = document.replace(b', "usage"', b"," + end + b'data: "usage"')
            parts.append(draw(st.sampled_from([b"data: ", b"data:"])) + document + end)
    return b"".join(part + end for part in parts), cost


@given(streams(), st.lists(st.integers(0, 10_000), max_size=40))
@example((FINAL + b"\r\n\r\n", Decimal("0.000093")), list(range(400)))
@example((FINAL + b"\n\n", Decimal("0.000093")), [])
def test_any_split_of_any_stream_gives_the_same_bill(stream: tuple[bytes, Decimal | None], places: list[int]) -> None:
    data, cost = stream
    for chunks in ([data], cut(data, places), [bytes([byte]) for byte in data]):
        bill = scan(*chunks).bill
        assert (bill.cost_usd if bill else None) == cost


def test_the_bill_is_exact() -> None:
    bill = scan(b": OPENROUTER PROCESSING\n\n", FINAL + b"\n\n", b"data: [DONE]\n\n").bill
    assert bill is not None
    assert str(bill.cost_usd) == "0.000093"
    assert (bill.prompt_tokens, bill.completion_tokens, bill.generation_id) == (7, 3, "gen-1")


def test_a_bill_without_its_blank_line_counts_at_the_end_of_the_stream() -> None:
    assert scan(FINAL).bill is not None
    assert scan(FINAL[:-1]).bill is None


@pytest.mark.parametrize("off", [-1, 0, 1, 3])
@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
@pytest.mark.parametrize("size", [1, 2, 40, 5000])
def test_the_bill_of_a_long_event_is_found_for_every_split(off: int, end: bytes, size: int) -> None:
    """The last event of an image has its bill behind more than a megabyte of base64."""
    start, bill_at_end = b'data: {"type":"completed","b64_json":"', b'","usage":{"cost":1.20e-7},"id":"gen-img-1"}'
    long = start + b"x" * (EVENT_BYTES_MAX + off - len(start) - len(bill_at_end)) + bill_at_end
    assert len(long) == EVENT_BYTES_MAX + off
    tail = [end, end]
    for chunks in ([long, *tail], [long + end * 2], [long[:-size], long[-size:], end * 2], [long + end, end], [long]):
        scanner = scan(*chunks)
        assert scanner.bill is not None
        assert (str(scanner.bill.cost_usd), scanner.generation_id) == ("1.20E-7", "gen-img-1")
        assert scanner.expects_end
    after = scan(long, end, end + FINAL + end, end).bill
    assert after is not None
    assert after.cost_usd == Decimal("0.000093")


def test_memory_is_bounded_on_an_endless_event() -> None:
    scanner = BillScanner()
    for _ in range(100):
        scanner.feed(b"x" * 100_000)
        assert len(scanner._partial) <= EVENT_BYTES_MAX + 100_000
    assert not scanner.at_event_boundary


@pytest.mark.parametrize("before", [b"", b": comment\n", b"event: completed\nid: 7\n"])
def test_a_bill_of_which_a_model_writes_in_a_long_event_is_none(before: bytes) -> None:
    text = rb'\",\"usage\":{\"cost\":1}},{"' + b"x" * EVENT_BYTES_MAX
    long = before + b'data: {"choices":[{"delta":{"content":"%s"},"usage":{"cost":2}}]}' % text.replace(b'{"', rb"{\"")
    for chunks in ([long, b"\n\n"], [long + b"\n\n"]):
        scanner = scan(*chunks)
        assert (scanner.bill, scanner.has_seen_end) == (None, False)
    error = scan(long, b"\n", b'data: {"id":"other"}', b"\n\n", b'data: {"error":{"code":502},"x":"%s"}' % text[:9], b"\n\n")
    assert error.has_seen_end


def test_a_long_event_may_be_an_error_and_have_a_generation_id() -> None:
    filler = b"x" * EVENT_BYTES_MAX
    scanner = scan(b'data: {"id":"gen-1","x":"%s",\ndata: "error":{"code":502}}\n\n' % filler)
    assert (scanner.generation_id, scanner.has_seen_end, scanner.at_event_boundary) == ("gen-1", True, True)
    scanner = scan(b'data: {"x":"%s",' % filler, b'\ndata: "id":\xff,\ndata: "error":null}', b"\n\n")
    assert (scanner.generation_id, scanner.has_seen_end, scanner.at_event_boundary) == (None, False, True)


@pytest.mark.parametrize(
    ("stream", "ended"),
    [
        (b"data: [DONE]\n\n", True),
        (b"data:[DONE]", True),
        (b"data: [DONE]\r\n\r\n: comment\n\n", True),
        (b'data: {"error": {"code": 502}, "choices": []}\n\n', True),
        (b'data: {"error": null, "choices": []}\n\n', False),
        (b'data: {"choices": [{"delta": {"content": "[DONE] \\"error\\""}}]}\n\n', False),
        (b'data: {"choices": [{"error": {"code": 1}}]}\n\n', False),
        (b": [DONE]\n\n", False),
        (b"data: [DON", False),
        (b"", False),
    ],
)
def test_the_scanner_sees_whether_openrouter_ended_the_response(stream: bytes, ended: bool) -> None:
    for known in (None, "gen-1"):
        for chunks in ([stream], [bytes([byte]) for byte in stream]):
            scanner = BillScanner(known)
            for chunk in chunks:
                scanner.feed(chunk)
            scanner.finish()
            assert scanner.has_seen_end is ended


FINISH = b'data: {"choices":[{"delta":{"content":""},"finish_reason":"stop"}]}\n\n'
RECORDED = b'data: {"choices":[{"index":0,"delta":{"content":""},"finish_reason":"stop"}],"usage":{"cost":1}}\n\n'
TEXT = b'data: {"choices":[{"delta":{"content":"x"},"finish_reason":null,"logprobs":null}]}\n\n'


@pytest.mark.parametrize("generation_id", ["gen-1", None])
@pytest.mark.parametrize("size", [1, 7, 1000, "event"])
@pytest.mark.parametrize(
    ("stream", "complete"),
    [
        (TEXT + FINISH + FINAL + b"\n\n", True),
        (TEXT + RECORDED, True),
        (TEXT + FINISH + RECORDED, True),
        (TEXT + FINISH + b": comment\n\n" + FINAL + b"\n\n: comment\n\n", True),
        (FINAL + b"\n\n" + TEXT + FINISH, True),  # the bill precedes the last text
        (TEXT + FINISH.replace(b'":"stop', b'": "stop') + RECORDED.replace(b'":"stop', b'": "stop'), True),
        (TEXT + FINAL + b"\n\n", False),
        (TEXT + FINISH, False),
        (TEXT + FINISH + FINAL, False),  # the end of the last event is missing
        (TEXT + RECORDED + b"data: {", False),
        (TEXT, False),
        (b'data: {"choices":[{"delta":{"content":"\\"finish_reason\\":\\"stop\\""}}]}\n\n' + FINAL + b"\n\n", False),
        (b': "finish_reason":"stop"\n\n' + FINAL + b"\n\n", False),
        (b"", False),
    ],
)
def test_a_stream_with_a_finish_reason_and_a_bill_is_complete_however_it_is_split(
    stream: bytes, complete: bool, size: int | str, generation_id: str | None
) -> None:
    chunks = [stream[start : start + size] for start in range(0, len(stream), size)] if isinstance(size, int) else events(stream)
    scanner = BillScanner(generation_id)
    for chunk in chunks:
        scanner.feed(chunk)
    scanner.finish()
    assert scanner.is_complete is complete
    assert not scanner.has_seen_end


def events(stream: bytes) -> list[bytes]:
    return [event for event in re.split(rb"(?<=\n\n)", stream) if event]


@pytest.mark.parametrize("identity", ["gen-1", "", "a b", "x" * 201, 5, None])
def test_the_first_generation_id_wins_unless_the_headers_gave_one(identity: object) -> None:
    stream = b": c\n\n" + b"".join(b"data: " + json.dumps({"id": name}).encode() + b"\n\n" for name in (identity, "gen-2"))
    assert scan(stream).generation_id == ("gen-1" if identity == "gen-1" else "gen-2")
    scanner = BillScanner("gen-0")
    scanner.feed(stream)
    assert scanner.generation_id == "gen-0"


def test_the_scanner_knows_event_boundaries() -> None:
    for stream, at_boundary in [
        (b"", True),
        (b"data: x", False),
        (b"data: x\n", False),
        (b"data: x\n\n", True),
        (b"a\r\n\r\n", True),
    ]:
        assert scan(stream).at_event_boundary is at_boundary, stream


@pytest.mark.parametrize(
    ("document", "cost"),
    [
        (b'{"usage":{"cost":0.1,"is_byok":true,"cost_details":{"upstream_inference_cost":2.5}}}', "2.6"),
        (b'{"usage":{"cost":0,"is_byok":true,"cost_details":{"upstream_inference_cost":null}}}', None),
        (b'{"usage":{"cost":0,"is_byok":true}}', None),
        (b'{"usage":{"cost":0.1,"is_byok":false,"cost_details":{"upstream_inference_cost":2.5}}}', "0.1"),
        (b'{"usage":{"cost":7.105427357601002e-15}}', "7.105427357601002E-15"),
        (b'{"usage":{"cost":0}}', "0"),
        (b'{"usage":null}', None),
        (b'{"usage":[]}', None),
        (b"[" * 100_000, None),
        (b'{"usage":{"cost":0.5}', None),
        (b"<html>", None),
        (b"", None),
    ],
)
def test_the_bill_of_a_plain_response(document: bytes, cost: str | None) -> None:
    bill = read_usage_report(document).bill
    assert (str(bill.cost_usd) if bill else None) == cost


@given(st.floats(min_value=0, max_value=99_999, allow_subnormal=True))
def test_a_number_is_parsed_exactly(number: float) -> None:
    assert parse_usd(repr(number).encode()) == Decimal(repr(number))


@given(st.binary(max_size=80))
def test_nothing_but_a_number_is_a_price(number: bytes) -> None:
    cost = parse_usd(number)
    assert cost is None or (cost.is_finite() and 0 <= cost < 100_000)


@pytest.mark.parametrize("generation_id", ["gen-1", None])
@pytest.mark.parametrize(
    ("stream", "expects"),
    [
        (b": x\n\n", False),
        (b'data: {"choices":[]}\n\n', False),
        (b'data: {"usage":{"cost":1}}\n\n', True),
        (b'data: {"usage":{"cost":1}}\n\n: x\n\n', True),
        (b'data: {"usage":{"cost":1}}\n\ndata: {"choices":[]}\n\n', False),
        (b'data: {"usage":{"cost":1}}\n\ndata: {"choices":[]}\n\ndata: {"usage":{"cost":2}}\n\n', True),
        (b"data: [DONE]\n\n", True),
    ],
)
@pytest.mark.parametrize("size", [1, 1000])
def test_the_end_is_expected_once_the_bill_is_the_last_event(
    stream: bytes, expects: bool, generation_id: str | None, size: int
) -> None:
    scanner = BillScanner(generation_id)
    for start in range(0, len(stream), size):
        scanner.feed(stream[start : start + size])
    assert scanner.expects_end is expects


@pytest.mark.parametrize(("event", "expects_end"), [(b": OPENROUTER PROCESSING", True), (b'data: {"choices":[]}', False)])
def test_after_the_bill_only_an_event_with_data_means_that_more_follows(event: bytes, expects_end: bool) -> None:
    assert scan(FINAL + b"\n\n", event + b"\n\n").expects_end is expects_end
