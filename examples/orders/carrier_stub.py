"""A carrier to try the shop with: a small HTTP server with the manners of real ones. Most answers are quick; some come late, some
are a 503, some never come; and whoever gets no answer cannot know whether the parcel was booked.

    PUT /parcels/{key}    books, once a key; the same key gets the same tracking number
    GET /ledger           what was booked, and how often it was slow, failed, hung

``python -m durable_cluster.examples.orders.carrier_stub`` prints its address, and ends with its standard input.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
import subprocess
import sys
from collections.abc import Generator

import msgspec

from durable_cluster.examples.orders.carrier import Booking, CarrierError, Ledger, Shipping

END_S = 5.0


class Manners(msgspec.Struct, frozen=True, kw_only=True):
    """How it answers: shares of all calls, and seconds."""

    quick_s_max: float = 0.01
    slow_share: float = 0.01
    slow_s_max: float = 2.0
    error_share: float = 0.02
    hang_share: float = 0.002


class CarrierStub:
    """The carrier: its ledger and its moods."""

    def __init__(self, manners: Manners, chance: random.Random) -> None:
        self._manners = manners
        self._chance = chance
        self._booked: dict[str, Booking] = {}
        self._calls = self._repeats = self._slow = self._errors = self._hangs = 0

    async def listen(self) -> asyncio.Server:
        """Serve on a free port of the loopback interface."""
        return await asyncio.start_server(self._serve, "127.0.0.1", 0, backlog=1024)

    def ledger(self) -> Ledger:
        """What it would answer to ``GET /ledger``."""
        return Ledger(
            bookings=list(self._booked.values()),
            calls=self._calls,
            repeats=self._repeats,
            slow=self._slow,
            errors=self._errors,
            hangs=self._hangs,
        )

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(EOFError, ConnectionError, asyncio.CancelledError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).split(b"\r\n")
                length = next((int(line[15:]) for line in head if line.lower().startswith(b"content-length:")), 0)
                body = await reader.readexactly(length)
                method, path, _ = head[0].decode().split(" ", 2)
                status, answer = await self._answer(reader, f"{method} {path}", body)
                writer.write(f"HTTP/1.1 {status}\r\nContent-Length: {len(answer)}\r\n\r\n".encode() + answer)
                await writer.drain()
        writer.close()

    async def _answer(self, reader: asyncio.StreamReader, what: str, body: bytes) -> tuple[str, bytes]:
        if what == "GET /ledger":
            return "200 OK", msgspec.json.encode(self.ledger())
        if not what.startswith("PUT /parcels/"):
            return "404 Not Found", b""
        self._calls += 1
        manners, mood = self._manners, self._chance.random()
        if mood < manners.error_share / 2:
            self._errors += 1
            return "503 Service Unavailable", b""  # before it has booked
        booking = self._book(what.removeprefix("PUT /parcels/"), msgspec.json.decode(body, type=Shipping))
        if mood < manners.error_share:
            self._errors += 1
            return "503 Service Unavailable", b""  # after it has booked
        if mood < manners.error_share + manners.hang_share:
            self._hangs += 1
            await reader.read()  # until the caller has had enough
            raise ConnectionResetError
        is_slow = mood > 1 - manners.slow_share
        self._slow += is_slow
        await asyncio.sleep(self._chance.uniform(0, manners.slow_s_max if is_slow else manners.quick_s_max))
        return "200 OK", msgspec.json.encode(booking)

    def _book(self, key: str, shipping: Shipping) -> Booking:
        known = self._booked.get(key)
        if known is not None:
            self._repeats += 1
            return known
        tracking = f"{shipping.country[:2].upper()}-{shipping.shipper_id}-{len(self._booked) + 1:07}"
        self._booked[key] = Booking(key, shipping.order_ref, tracking)
        return self._booked[key]


@contextlib.contextmanager
def carrier_process() -> Generator[str]:
    """A carrier in a process of its own; its address (host:port). Raises CarrierError if it does not start."""
    with subprocess.Popen(
        [sys.executable, "-m", __name__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            address = process.stdout.readline().strip()
            if not address:
                raise CarrierError(f"the carrier's process ended with {process.wait()} before it listened")
            yield address
        finally:
            process.stdin.close()
            try:
                process.wait(END_S)
            except subprocess.TimeoutExpired:
                process.kill()


async def _main() -> None:
    server = await CarrierStub(Manners(), random.Random()).listen()
    host, port = server.sockets[0].getsockname()[:2]
    print(f"{host}:{port}", flush=True)
    await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; whoever started it decides
    asyncio.run(_main())
