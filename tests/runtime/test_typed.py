"""Typed records from plain data: what goes in comes back, and what is malformed is one line with its place."""

import json
from dataclasses import dataclass
from typing import Any, Literal

import msgpack
import pytest

from unlocked.runtime.control import messages as m
from unlocked.runtime.metrics.records import EpochPart, Scores
from unlocked.runtime.typed import from_plain, to_plain


@dataclass(frozen=True, kw_only=True, slots=True)
class Inner:
    value: float
    text: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outer:
    count: int
    kind: Literal["a", "b"]
    data: bytes
    inner: tuple[Inner, ...]
    pair: tuple[int, str]
    named: dict[str, Inner]
    maybe: Inner | None = None
    flag: bool = False


OUTER = Outer(
    count=1, kind="a", data=b"\xff", inner=(Inner(value=0.5),), pair=(1, "x"), named={"y": Inner(value=2.0, text="z")}
)


def plain() -> dict[str, Any]:
    """As msgpack gives it back."""
    content: dict[str, Any] = msgpack.unpackb(msgpack.packb(to_plain(OUTER)))
    return content


def test_a_record_survives_msgpack() -> None:
    assert from_plain(Outer, plain(), "outer") == OUTER


def test_a_record_without_bytes_survives_json() -> None:
    part = EpochPart(
        stage=1, epoch=2, local_losses=(("conv1", 0.5),), seconds=1.0, train=Scores(loss=1, acc1=2, acc5=3)
    )
    assert from_plain(EpochPart, json.loads(json.dumps(to_plain(part))), "part") == part


def test_an_int_may_stand_for_a_float_and_defaults_may_be_left_out() -> None:
    inner = from_plain(Inner, {"value": 3}, "inner")
    assert inner == Inner(value=3.0)
    assert type(inner.value) is float


@pytest.mark.parametrize(
    ("change", "place"),
    [
        ({"count": True}, "count"),
        ({"count": 1.0}, "count"),
        ({"count": "1"}, "count"),
        ({"flag": 1}, "flag"),
        ({"kind": "c"}, "kind"),
        ({"data": "text"}, "data"),
        ({"inner": [{"value": 1.0}, {"value": None}]}, r"inner\[1\]"),
        ({"inner": [{"value": 1.0, "more": 1}]}, r"inner\[0\].*unknown fields more; valid: value, text"),
        ({"named": {"q": {"value": 1.0, "more": 1}}}, r"named\['q'\].*more"),
        ({"maybe": {"value": 1.0, "more": 1}}, "maybe.*more"),
        ({"pair": [1]}, "pair"),
        ({"pair": [1, "x", 2]}, "pair"),
        ({"extra": 1}, "unknown fields extra"),
    ],
)
def test_what_is_malformed_is_one_line_with_its_place(change: dict[str, Any], place: str) -> None:
    with pytest.raises(ValueError, match=f"^outer.*{place}") as caught:
        from_plain(Outer, {**plain(), **change}, "outer")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("value", [None, [], 3, {}, {3: 4}])
def test_what_is_no_record_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match=r"^outer: "):
        from_plain(Outer, value, "outer")


def test_the_bytes_on_the_wire_are_a_map_of_fields() -> None:
    """Workers of one protocol version understand each other, whatever library reads the records."""
    packed = m.pack(m.Hello(stage=1, rank=2, pid=3, host="h", layers=("conv1", "conv2")))
    body = {"v": 8, "kind": "Hello", "stage": 1, "rank": 2, "pid": 3, "host": "h", "layers": ["conv1", "conv2"]}
    body["incarnation"] = 0
    assert packed == msgpack.packb(body)


@pytest.mark.parametrize("change", [{"stage": "1"}, {"layers": "conv1"}, {"more": 1}, {"pid": None}])
def test_a_malformed_message_is_a_message_error(change: dict[str, Any]) -> None:
    body = m.pack(m.Hello(stage=1, rank=2, pid=3, host="h", layers=()))
    with pytest.raises(m.MessageError, match=r"^Hello: "):
        m.unpack([msgpack.packb({**msgpack.unpackb(body), **change})])
