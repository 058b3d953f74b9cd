"""The slowest must not hold up all."""

import asyncio

from katapod.monitor.together import ask_together


async def at_once(value: int) -> int:
    return value


async def never() -> int:
    await asyncio.Event().wait()
    raise AssertionError


async def test_those_that_hang_cost_their_own_answer() -> None:
    questions = [never(), at_once(1), at_once(2), never(), at_once(3)]
    assert await ask_together(questions, grace_s=0.01) == [None, 1, 2, None, 3]


async def test_a_few_fast_ones_do_not_cut_the_others_off() -> None:
    """On a loaded host most are slow: they set the pace."""
    gate = asyncio.Event()

    async def slow(value: int) -> int:
        await gate.wait()
        return value

    asking = asyncio.create_task(ask_together([at_once(1), slow(2), slow(3), slow(4)], grace_s=0.01))
    await asyncio.sleep(0.1)
    assert not asking.done()
    gate.set()
    assert await asking == [1, 2, 3, 4]


async def test_none_and_one() -> None:
    assert await ask_together([]) == []
    assert await ask_together([at_once(1)]) == [1]


async def test_all_are_ended_with_who_asks() -> None:
    ended = asyncio.Event()

    async def asked() -> int:
        try:
            return await never()
        finally:
            ended.set()

    asking = asyncio.create_task(ask_together([asked()]))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    asking.cancel()
    await asyncio.wait({asking})
    assert ended.is_set()
