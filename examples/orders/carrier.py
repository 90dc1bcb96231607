"""A carrier's API as the shop calls it: HTTP/1.1 over a few kept connections, answers as they come, errors raised.

Nothing is tried again here: that is what the step's ``Retry`` is for, and its ``timeout`` ends a call that hangs.
"""

from __future__ import annotations

import asyncio
from http.client import HTTPConnection
from weakref import WeakKeyDictionary

import msgspec

CONNECTIONS_MAX = 64
LEDGER_TIMEOUT_S = 60.0

Link = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class CarrierError(Exception):
    """The carrier's answer was no booking."""


class Shipping(msgspec.Struct, frozen=True):
    """What is asked for."""

    order_ref: str
    shipper_id: int
    country: str
    boxes: int


class Booking(msgspec.Struct, frozen=True):
    """One line of the carrier's ledger: a key books once, however often it is sent."""

    key: str
    order_ref: str
    tracking: str


class Ledger(msgspec.Struct, frozen=True, kw_only=True):
    """All bookings, and how the carrier behaved. ``repeats``: calls with a key that had booked before."""

    bookings: list[Booking]
    calls: int
    repeats: int
    slow: int
    errors: int
    hangs: int


class Carrier:
    """The connections to carriers: kept between calls, so many at most for each event loop."""

    def __init__(self) -> None:
        self._of_loop: WeakKeyDictionary[asyncio.AbstractEventLoop, _Links] = WeakKeyDictionary()

    async def book(self, address: str, shipping: Shipping, *, key: str) -> str:
        """The tracking number; the same for the same key. Raises CarrierError and OSError; even then it may be booked."""
        links = self._of_loop.setdefault(asyncio.get_running_loop(), _Links())
        body = msgspec.json.encode(shipping)
        head = f"PUT /parcels/{key} HTTP/1.1\r\nHost: {address}\r\nContent-Length: {len(body)}\r\n\r\n"
        async with links.room:
            status, answer = await links.exchange(address, head.encode() + body)
        if status != 200:
            raise CarrierError(f"the carrier answered {status}")
        return msgspec.json.decode(answer, type=Booking).tracking


class _Links:
    """The connections of one event loop."""

    def __init__(self) -> None:
        self.room = asyncio.Semaphore(CONNECTIONS_MAX)
        self._idle: dict[str, list[Link]] = {}

    async def exchange(self, address: str, request: bytes) -> tuple[int, bytes]:
        idle = self._idle.setdefault(address, [])
        host, _, port = address.partition(":")
        reader, writer = idle.pop() if idle else await asyncio.open_connection(host, int(port))
        is_over = False
        try:
            writer.write(request)
            head = (await reader.readuntil(b"\r\n\r\n")).split(b"\r\n")
            length = next(int(line[15:]) for line in head if line.lower().startswith(b"content-length:"))
            answer = await reader.readexactly(length)
            is_over = True
        except EOFError as error:
            raise CarrierError("the carrier hung up") from error
        finally:
            # A connection with an answer still to come would give it to the next caller.
            if is_over:
                idle.append((reader, writer))
            else:
                writer.close()
        return int(head[0].split()[1]), answer


def ledger_of(address: str) -> Ledger:
    """What the carrier has booked. Raises CarrierError and OSError."""
    connection = HTTPConnection(address, timeout=LEDGER_TIMEOUT_S)
    try:
        connection.request("GET", "/ledger")
        response = connection.getresponse()
        body = response.read()
    finally:
        connection.close()
    if response.status != 200:
        raise CarrierError(f"the carrier answered {response.status}")
    return msgspec.json.decode(body, type=Ledger)
