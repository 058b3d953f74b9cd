"""ttrpc frames: any cut of a stream gives the same frames, and nothing a peer sends crashes or fills us."""

import itertools
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from katapod.rpc.framing import (
    DATA_SIZE_MAX,
    REQUEST,
    RESPONSE,
    Frame,
    FrameDecoder,
    FrameError,
    encode_frame,
    encode_request,
    encode_response,
    parse_request,
    parse_response,
)
from katapod.rpc.status import RpcError, StatusCode

HEADER_SIZE = 10
Shown = tuple[int, int, bytes, bool]

frames_sent = st.lists(
    st.tuples(st.integers(0, 2**32 - 1), st.sampled_from([REQUEST, RESPONSE, 3]), st.binary(max_size=300)), max_size=8
)


def shown(frames: list[Frame]) -> list[Shown]:
    return [(frame.stream_id, frame.kind, frame.data, frame.oversized) for frame in frames]


def cut(data: bytes, places: list[int]) -> list[bytes]:
    marks = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    return [data[start:end] for start, end in itertools.pairwise(marks)]


@given(sent=frames_sent, places=st.lists(st.integers(0, 10_000), max_size=20))
def test_any_cut_gives_the_same_frames(sent: list[tuple[int, int, bytes]], places: list[int]) -> None:
    stream = b"".join(encode_frame(*frame) for frame in sent)
    decoder = FrameDecoder()
    got = [item for piece in cut(stream, places) for item in shown(decoder.feed(piece))]
    assert got == [(*frame, False) for frame in sent]


@settings(max_examples=20, deadline=None)
@given(excess=st.integers(1, 70_000), places=st.lists(st.integers(0, 2**23), max_size=6))
def test_an_oversized_frame_is_skipped_to_its_last_byte(excess: int, places: list[int]) -> None:
    size = DATA_SIZE_MAX + excess
    stream = (
        encode_frame(1, REQUEST, b"before")
        + struct.pack(">IIBB", size, 3, REQUEST, 0)
        + bytes(size)
        + encode_frame(5, REQUEST, b"after")
    )
    decoder = FrameDecoder()
    got = [item for piece in cut(stream, places) for item in shown(decoder.feed(piece))]
    assert got == [(1, REQUEST, b"before", False), (3, REQUEST, b"", True), (5, REQUEST, b"after", False)]


@given(pieces=st.lists(st.binary(max_size=200), max_size=20))
def test_garbage_is_frames_or_a_frame_error(pieces: list[bytes]) -> None:
    decoder = FrameDecoder()
    try:
        for piece in pieces:
            decoder.feed(piece)
    except FrameError as exc:
        assert "unknown type" in str(exc)  # noqa: PT017 - an error is one of two good outcomes


def test_what_is_held_is_bounded() -> None:
    decoder = FrameDecoder()
    piece = bytes(65536)
    decoder.feed(struct.pack(">IIBB", DATA_SIZE_MAX, 1, REQUEST, 0))
    for _ in range(DATA_SIZE_MAX // len(piece) - 1):
        assert decoder.feed(piece) == []
    assert len(decoder._buffer) <= DATA_SIZE_MAX + HEADER_SIZE
    assert len(decoder.feed(piece)) == 1
    assert len(decoder._buffer) == 0
    decoder.feed(struct.pack(">IIBB", 2**32 - 1, 1, REQUEST, 0))
    for _ in range(100):
        decoder.feed(piece)
        assert len(decoder._buffer) == 0


def test_the_largest_frame_is_taken() -> None:
    data = bytes(DATA_SIZE_MAX)
    assert shown(FrameDecoder().feed(encode_frame(1, REQUEST, data))) == [(1, REQUEST, data, False)]


def test_request_round_trip() -> None:
    (frame,) = FrameDecoder().feed(encode_request(7, "grpc.Health", "Check", b"payload", timeout_nano=5))
    request = parse_request(frame)
    assert (request.service, request.method, request.payload) == ("grpc.Health", "Check", b"payload")
    assert (frame.stream_id, request.timeout_nano) == (7, 5)


def test_a_request_that_does_not_fit_is_refused_here() -> None:
    with pytest.raises(RpcError, match="cannot call WriteStdin: its") as caught:
        encode_request(1, "s", "WriteStdin", bytes(DATA_SIZE_MAX))
    assert caught.value.code is StatusCode.RESOURCE_EXHAUSTED


def answer(encoded: bytes) -> bytes:
    (frame,) = FrameDecoder().feed(encoded)
    return parse_response(frame)


def test_answers() -> None:
    assert answer(encode_response(1, b"payload")) == b"payload"
    assert answer(encode_response(1)) == b""
    with pytest.raises(RpcError, match="no such container") as caught:
        answer(encode_response(1, code=StatusCode.NOT_FOUND, message="no such container"))
    assert caught.value.code is StatusCode.NOT_FOUND


def test_an_answer_that_does_not_fit_becomes_an_error() -> None:
    with pytest.raises(RpcError, match="too large") as caught:
        answer(encode_response(1, bytes(DATA_SIZE_MAX)))
    assert caught.value.code is StatusCode.RESOURCE_EXHAUSTED


def test_an_error_that_names_a_path_which_is_not_utf8_can_be_sent() -> None:
    """os.fsdecode gives such paths lone surrogates, which protobuf's strings refuse."""
    with pytest.raises(RpcError, match="cannot open /caf"):
        answer(encode_response(1, code=StatusCode.NOT_FOUND, message="cannot open /caf\udce9"))


def test_an_endless_message_is_cut_when_read() -> None:
    with pytest.raises(RpcError) as caught:
        answer(encode_response(1, code=StatusCode.INTERNAL, message="x" * 1_000_000))
    assert len(caught.value.message) < 5000


def test_an_unknown_code_is_unknown() -> None:
    with pytest.raises(RpcError) as caught:
        answer(encode_response(1, code=999, message="?"))
    assert caught.value.code is StatusCode.UNKNOWN


@pytest.mark.parametrize(
    ("frame", "code"),
    [
        (Frame(1, REQUEST, 0, b"", oversized=True), StatusCode.RESOURCE_EXHAUSTED),
        (Frame(1, RESPONSE, 0, b""), StatusCode.INVALID_ARGUMENT),
        (Frame(2, REQUEST, 0, b""), StatusCode.INVALID_ARGUMENT),
        (Frame(1, REQUEST, 0, b"\xff\xff\xff"), StatusCode.INVALID_ARGUMENT),
    ],
)
def test_bad_requests(frame: Frame, code: StatusCode) -> None:
    with pytest.raises(RpcError) as caught:
        parse_request(frame)
    assert caught.value.code is code


def test_bad_answers() -> None:
    with pytest.raises(RpcError, match="larger than"):
        parse_response(Frame(1, RESPONSE, 0, b"", oversized=True))
    with pytest.raises(RpcError, match="cannot parse") as caught:
        parse_response(Frame(1, RESPONSE, 0, b"\xff\xff"))
    assert caught.value.code is StatusCode.INTERNAL
