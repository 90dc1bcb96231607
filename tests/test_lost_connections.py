"""A server that dies, a connection that is cut, a commit whose answer never comes: asked about, and gone on from there."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from durable_cluster import App, Context, Continuation, Settings, schema
from durable_cluster.consumer import Consumer
from durable_cluster.database import connect_worker
from durable_cluster.embedded import EmbeddedPostgres
from durable_cluster.loading import load_app

Eventually = Callable[..., None]
SHARDS = 2
FLOWS = '''
"""What runs while the server dies."""
import asyncio

from durable_cluster import App, Context, Continuation, Retry

app = App("surviving")
chain = app.machine("chain", state=dict)


@chain.step(start=True, transactional=True)
def book(ctx: Context, at: dict) -> Continuation:
    ctx.tx.execute("insert into ledger values (%s, %s)", (at["n"], at["p"]))
    return ctx.done(at["n"]) if at["p"] == 5 else ctx.goto(rests, at)


@chain.step()
async def rests(ctx: Context, at: dict) -> Continuation:
    await asyncio.sleep(0.15)
    return ctx.sleep("50ms", book, at | {"p": at["p"] + 1})
'''


def test_a_worker_asks_the_server_to_find_out_soon_that_it_has_vanished(dsn: str) -> None:
    """What each is set to a server only says of a session by TCP: here, that it was set at all."""
    with connect_worker(dsn, name="vanishing", settings=Settings()) as worker:
        asked = worker.execute("select name from pg_settings where name like 'tcp_keepalives%' and source = 'session'")
        assert len(asked.fetchall()) == 3


@pytest.mark.parametrize("is_early", [True, False], ids=["while the cluster starts", "while it works"])
def test_a_server_that_is_killed_and_comes_back_finds_its_cluster_again(
    is_early: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    run_cluster: Callable[..., Any],
    eventually: Eventually,
    capfd: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "surviving_flows.py").write_text(FLOWS)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("surviving_flows", None)
    pg_bin = os.environ.get("DURABLE_PG_BIN")
    with EmbeddedPostgres(tmp_path / "pg", Path(pg_bin) if pg_bin else None) as server:
        with psycopg.connect(server.dsn, autocommit=True) as connection:
            schema.install(connection, shards=SHARDS)
            connection.execute("create table ledger (n int, p int)")
            app = load_app("surviving_flows:app")
            app.client.use(server.dsn)
            handles = app.named("chain").start_many([{"n": n, "p": 0} for n in range(40)])
            run_cluster(
                server.dsn, app="surviving_flows:app", settings=Settings(dead_interval_s=30.0, page_window_ms=20)
            )
            if not is_early:
                eventually(
                    lambda: connection.execute("select count(*) from ledger where p = 1").fetchone() > (0,), seconds=30
                )
        for _ in range(2):
            os.kill(int((tmp_path / "pg/pgdata/postmaster.pid").read_text().split()[0]), signal.SIGKILL)
            eventually(lambda: _answers(server.dsn), seconds=30, what="the server's restart")

        def is_over() -> bool:
            try:
                return all(handle.status() == "completed" for handle in handles)
            except psycopg.Error:
                return False

        eventually(is_over, seconds=60, what="the end of every workflow")
        with connected(server.dsn, eventually) as connection:
            rows = connection.execute("select n, p from ledger order by n, p").fetchall()
            assert rows == [(n, p) for n in range(40) for p in range(6)]
            assert connection.execute("select count(*) from durable.detached").fetchone() == (0,)
    said = Counter(
        line.partition(" WARNING ")[2] for line in capfd.readouterr().err.splitlines() if " WARNING " in line
    )
    assert said or is_early, "a lost connection is told"
    assert all(times <= 4 for times in said.values()), said


def connected(dsn: str, eventually: Eventually) -> psycopg.Connection:
    """A connection that has answered: a server that has just come back may end its first ones."""
    made: list[psycopg.Connection] = []

    def answers() -> bool:
        try:
            made.append(psycopg.connect(dsn))
            return made[-1].execute("select true").fetchone() == (True,)
        except psycopg.Error:
            return False

    eventually(answers, what="a connection")
    return made[-1]


def _answers(dsn: str) -> bool:
    try:
        psycopg.connect(dsn, connect_timeout=1).close()
    except psycopg.Error:
        return False
    return True


class Proxy:
    """Between a consumer and its server. Told to, it passes a client's next COMMIT on and cuts both sides before the answer."""

    def __init__(self, to: str) -> None:
        self._to = to
        self.must_cut = threading.Event()
        self.cuts = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.socket(socket.AF_UNIX)
            server.connect(self._to)
            is_cut = threading.Event()
            for source, target, is_asking in ((client, server, True), (server, client, False)):
                threading.Thread(target=self._pump, args=(source, target, is_asking, is_cut), daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket, is_asking: bool, is_cut: threading.Event) -> None:
        try:
            while data := source.recv(1 << 16):
                if is_asking and self.must_cut.is_set() and b"COMMIT" in data:
                    self.must_cut.clear()
                    self.cuts += 1
                    is_cut.set()
                if not is_asking and is_cut.is_set():
                    break  # the server has answered: it has committed; nobody hears of it
                target.sendall(data)
        except OSError:
            pass
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def proxy(server: str) -> Iterator[Proxy]:
    known = conninfo_to_dict(server)
    made = Proxy(f"{known['host']}/.s.PGSQL.{known.get('port') or 5432}")
    yield made
    made.close()


@pytest.mark.parametrize("kind", ["transactional", "sleeping", "slow"])
def test_a_commit_whose_answer_is_lost_is_asked_about_and_not_repeated(
    dsn: str, conn: psycopg.Connection, proxy: Proxy, kind: str
) -> None:
    conn.execute("create table ledger (n int, p int)")
    app = App("unsure", dsn=dsn, settings=Settings(page_window_ms=5, takeover_probe_s=0.0))
    machine = app.machine("unsure", state=dict)
    runs: Counter[int] = Counter()

    @machine.step(start=True, transactional=True)
    def book(ctx: Context, at: dict) -> Continuation:  # type: ignore[type-arg]
        ctx.tx.execute("insert into ledger values (%s, %s)", (at["n"], at["p"]))
        if at["p"] == 3:
            return ctx.done(at["n"])
        after = at | {"p": at["p"] + 1}
        if kind == "sleeping":
            return ctx.sleep("1ms", book, after)
        return ctx.goto(rests if kind == "slow" else book, after)

    @machine.step()
    async def rests(ctx: Context, at: dict) -> Continuation:  # type: ignore[type-arg]
        runs[at["n"]] += 1
        import asyncio

        await asyncio.sleep(0.02)
        return ctx.goto(book, at)

    handles = machine.start_many([{"n": n, "p": 0} for n in range(20)])
    known = conninfo_to_dict(dsn)
    plain = {"dbname": known["dbname"], "sslmode": "disable", "gssencmode": "disable"}
    through = make_conninfo(dsn, host="127.0.0.1", port=str(proxy.port), **plain)
    consumer = Consumer(through, 0, app.machines, app.settings)
    consumer.shards = [0, 1]
    losses = 0
    deadline = time.monotonic() + 30
    while not all(handle.status() == "completed" for handle in handles):
        assert time.monotonic() < deadline, losses
        if losses < 6:
            proxy.must_cut.set()
        try:
            consumer.work(lambda: False, lambda: None) or consumer.wait(0)
        except psycopg.OperationalError:
            losses += 1
            consumer.reconnect()
    consumer.close()
    assert losses == proxy.cuts >= 3
    expected = [(n, p) for n in range(20) for p in range(4)]
    assert conn.execute("select n, p from ledger order by n, p").fetchall() == expected
    assert conn.execute("select count(*) from durable.detached").fetchone() == (0,)
