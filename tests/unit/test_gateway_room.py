"""Room for executions: so many at a time, the others in the order in which they came."""

from __future__ import annotations

import trio
import trio.testing

from agentfuse.gateway.executions.room import Room


def test_there_is_room_for_any_number_if_nobody_says_otherwise() -> None:
    room = Room(None)
    assert all(room.take(str(number)) for number in range(1000))


async def test_who_waits_longest_is_next_and_nobody_overtakes() -> None:
    room = Room(1)
    assert room.take("first")
    assert not room.take("second")
    came: list[str] = []

    async def wait(name: str, since: float) -> None:
        await room.wait(name, since)
        came.append(name)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait, "late", 2.0)
        nursery.start_soon(wait, "early", 1.0)
        await trio.testing.wait_all_tasks_blocked()
        room.leave("first")
        assert not room.take("overtakes")
        await trio.testing.wait_all_tasks_blocked()
        assert came == ["early"]
        room.leave("early")
    assert came == ["early", "late"]
    room.leave("late")
    assert room.take("next")


async def test_who_gives_up_takes_nobodys_turn() -> None:
    room = Room(1)
    room.hold("adopted")
    room.hold("adopted, too")
    with trio.move_on_after(0):
        await room.wait("gives up", 1.0)
    room.leave("adopted")
    assert not room.take("more than there is room for")
    room.leave("adopted, too")
    room.leave("adopted, too")
    assert room.take("next")
    assert not room.take("one too many")
