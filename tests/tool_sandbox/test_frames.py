"""A runner's frames, as its pipe brings them."""

import asyncio
import os

import pytest

from tool_sandbox.container import HEADER, MAX_FRAME_BYTES, Frames


def frame(body: bytes) -> bytes:
    return HEADER.pack(len(body)) + body


@pytest.mark.parametrize("size", [1, 3, 4, 7, 1000])
def test_frames_come_whole_and_in_order_however_the_bytes_come(size: int) -> None:
    came: list[bytes] = []
    frames = Frames(came.append, lambda error: None)
    data = frame(b"one") + frame(b"") + frame(b"three" * 50) + frame(b"half")[:-1]
    for start in range(0, len(data), size):
        frames.data_received(data[start : start + size])
    assert came == [b"one", b"", b"three" * 50]
    frames.data_received(b"f")
    assert came[3:] == [b"half"]


async def test_an_end_is_told_once_and_a_frame_that_is_too_long_is_one() -> None:
    came: list[bytes] = []
    ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    reader, writer = os.pipe()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: Frames(came.append, ended.set_result), os.fdopen(reader, "rb", 0)
    )
    os.write(writer, frame(b"good") + HEADER.pack(MAX_FRAME_BYTES + 1) + b"rest")
    assert await asyncio.wait_for(ended, 10) == f"it sent a frame of {MAX_FRAME_BYTES + 1} bytes"
    assert came == [b"good"]
    os.close(writer)


async def test_the_end_of_the_stream_has_nothing_wrong_with_it() -> None:
    ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    reader, writer = os.pipe()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: Frames(lambda body: None, ended.set_result), os.fdopen(reader, "rb", 0)
    )
    os.close(writer)
    assert await asyncio.wait_for(ended, 10) == ""
