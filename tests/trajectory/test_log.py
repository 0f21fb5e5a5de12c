"""Groups survive the way to disk and back, and a log survives being cut off anywhere."""

import dataclasses
import pickle

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from trajectory.log import TrajectoryLog, decode_group, encode_group, read_log
from trajectory.types import Group, Reward, Segment, Task, ToolCall, ToolResult, Trajectory, Turn


def make_trajectory(index=0, response=(4, 5, 6), logprobs=(-0.5, 0.0, -1.25), text="<think>√</think>"):
    result = ToolResult(status="timeout", output="\x00\ud800", message="waited", retry_after_s=1.5, fresh=False)
    return Trajectory(
        task_id="t",
        index=index,
        prompt_ids=np.array([1, 2, 3], dtype=np.int32),
        response_ids=np.array(response, dtype=np.int32),
        loss_mask=np.array([True, False, True][: len(response)], dtype=np.bool_),
        logprobs=np.array(logprobs, dtype=np.float32),
        segments=(Segment(start=0, end=3, policy_version=7),),
        turns=(
            Turn(
                text="a",
                start=0,
                end=1,
                result_end=2,
                tool_call=ToolCall(tool="python", content="1"),
                tool_result=result,
            ),
            Turn(text="b", start=2, end=3, result_end=3, generate_s=0.25),
        ),
        text=text,
        finish_reason="answer",
        duration_s=0.125,
    )


def make_group(name="0-1-1", num=2):
    return Group(
        lease_id=name,
        task=Task(id="t", question="2+3?", golds=("5", "five"), kind="qa"),
        trajectories=tuple(make_trajectory(i) for i in range(num)),
        rewards=tuple(
            Reward(total=0.1, parts={"outcome": 0.0, "format": 0.1}, correct=False, format_ok=True, notes=("x",))
            for _ in range(num)
        ),
        metrics={"tool_s": np.float32(0.5)},
    )


def assert_same(a, b):
    """Equality of payloads, arrays included: type, shape, dtype and every bit."""
    assert type(a) is type(b)
    if dataclasses.is_dataclass(a):
        for field in dataclasses.fields(a):
            assert_same(getattr(a, field.name), getattr(b, field.name))
    elif isinstance(a, np.ndarray):
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())
    elif isinstance(a, tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


def test_a_group_survives_in_every_field():
    group = dataclasses.replace(make_group(), metrics={"tool_s": 0.5})
    decoded = decode_group(encode_group(group))
    assert_same(decoded, group)
    decoded.trajectories[0].response_ids[0] = 9  # writable, like the original
    assert decode_group(encode_group(make_group())).metrics == {"tool_s": 0.5}  # a numpy scalar becomes a number


@given(
    logprobs=npst.arrays(np.float32, st.integers(0, 20), elements=st.floats(width=32, allow_nan=True)),
    text=st.text(alphabet=st.characters(exclude_categories=())),
)
def test_any_floats_and_text_survive_exactly(logprobs, text):
    trajectory = dataclasses.replace(make_trajectory(), logprobs=logprobs, text=text)
    group = dataclasses.replace(make_group(), trajectories=(trajectory,), rewards=(), metrics={})
    assert_same(decode_group(encode_group(group)), group)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        b"\x91" * 100_000,
        msgpack.packb([1]),
        msgpack.packb({"format": 1, "group": {}}),
        msgpack.packb({"format": 2, "group": {}}),
        encode_group(make_group())[:-1],
        encode_group(make_group()).replace(b"lease_id", b"lease_iq"),
        encode_group(make_group()).replace(b"<i4", b"|O4"),
        pickle.dumps(make_group),
    ],
)
def test_what_is_no_group_is_refused(data):
    with pytest.raises(ValueError, match="not a group of trajectories"):
        decode_group(data)


def test_the_log_gives_back_what_was_appended(tmp_path):
    path = tmp_path / "trajectories.log"
    for names in (["a", "b"], ["c"]):
        log = TrajectoryLog(path)
        for name in names:
            log.append(make_group(name))
        assert [g.lease_id for g in read_log(path)][-1] == names[-1]  # readable at once
        log.close()
    assert [g.lease_id for g in read_log(path)] == ["a", "b", "c"]


@pytest.fixture(scope="module")
def two_records(tmp_path_factory):
    path = tmp_path_factory.mktemp("log") / "log"
    log = TrajectoryLog(path)
    log.append(make_group("a"))
    first = path.stat().st_size
    log.append(make_group("b"))
    log.close()
    return path.read_bytes(), first


@settings(max_examples=60)
@given(data=st.data())
def test_a_log_that_is_cut_off_anywhere_is_read_up_to_there_and_goes_on(tmp_path_factory, two_records, data):
    whole, first = two_records
    cut = data.draw(st.integers(0, len(whole) - 1))
    path = tmp_path_factory.mktemp("cut") / "log"
    path.write_bytes(whole[:cut])
    expected = ["a"] if cut >= first else []
    assert [g.lease_id for g in read_log(path)] == expected
    log = TrajectoryLog(path)
    log.append(make_group("c"))
    log.close()
    assert [g.lease_id for g in read_log(path)] == [*expected, "c"]


@pytest.mark.parametrize("damage", ["flip", "zeros", "huge length"])
def test_a_damaged_tail_is_reported_and_kept_aside(tmp_path, two_records, damage, caplog):
    whole, first = two_records
    tail = {
        "flip": whole[first:-1] + bytes([whole[-1] ^ 1]),
        "zeros": bytes(4096),
        "huge length": b"\xff" * 8 + b"x",
    }[damage]
    path = tmp_path / "log"
    path.write_bytes(whole[:first] + tail)
    assert [g.lease_id for g in read_log(path)] == ["a"]
    assert f"the last {len(tail)} bytes, from byte {first} on, are no complete record" in caplog.text
    TrajectoryLog(path).close()
    assert path.read_bytes() == whole[:first]
    assert (tmp_path / "log.torn").read_bytes() == tail


def test_an_intact_log_is_not_reported(tmp_path, two_records, caplog):
    path = tmp_path / "log"
    path.write_bytes(two_records[0])
    assert len(list(read_log(path))) == 2
    TrajectoryLog(path).close()
    assert caplog.text == ""
    assert not (tmp_path / "log.torn").exists()


def test_a_full_disk_leaves_no_torn_record(tmp_path, two_records, monkeypatch):
    path = tmp_path / "log"
    path.write_bytes(two_records[0])
    log = TrajectoryLog(path)
    file = log._file

    class FullDisk:
        """Takes 10 bytes of a write, as a disk does that has room for no more."""

        def __getattr__(self, name):
            return getattr(file, name)

        def write(self, data):
            return file.write(data[:10])

    monkeypatch.setattr(log, "_file", FullDisk())
    with pytest.raises(OSError, match="no room for"):
        log.append(make_group("c"))
    assert path.read_bytes() == two_records[0]
    monkeypatch.setattr(log, "_file", file)
    log.append(make_group("d"))
    log.close()
    assert [g.lease_id for g in read_log(path)] == ["a", "b", "d"]


def test_unknown_things_are_refused_when_written():
    with pytest.raises(TypeError, match="a group holds a object"):
        encode_group(dataclasses.replace(make_group(), metrics={"x": object()}))
