"""Pieces of answers on their way: whoever stops listening is let go at once."""

import asyncio

import pytest

from chiasm.generation.ticket import Piece, Ticket
from chiasm.serving.stream import pieces


@pytest.mark.parametrize("turns", range(12))
def test_leaving_as_a_piece_comes_ends_the_answer(turns: int) -> None:
    """However many turns of the event loop lie between the piece and the end."""

    async def run() -> None:
        ticket = Ticket(1)

        async def listen() -> None:
            async for _ in pieces([ticket], 60):
                pass

        listening = asyncio.ensure_future(listen())
        await asyncio.sleep(0.01)
        ticket.put(Piece("a", 97, None, []))
        for _ in range(turns):
            await asyncio.sleep(0)
        listening.cancel()
        done, _ = await asyncio.wait([listening], timeout=1)
        assert done and listening.cancelled() and ticket.cancelled
        ticket.finish("cancelled")

    asyncio.run(run())
