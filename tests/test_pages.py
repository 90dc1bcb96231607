"""What a page costs does not depend on what was read before it."""

from __future__ import annotations

import psycopg

from durable_cluster import statements
from durable_cluster.envelope import decode_page

SHARD = 0
READ_BEFORE = 20_000
BUFFERS_MAX = 60


def appended(conn: psycopg.Connection, events: int) -> None:
    conn.execute(
        "select count(pgque.insert_event(durable.queue_of(%s), 'steps', '{}', '1', null, null, null))"
        " from generate_series(1, %s)",
        (SHARD, events),
    )


def test_the_first_page_of_a_window_walks_nothing_that_was_read_before_it(conn: psycopg.Connection) -> None:
    """An index entered at the window's zero cursor would be read from its beginning: 100 buffers here."""
    statements.join_shard(conn, SHARD, "m")
    for events in (READ_BEFORE, 1):
        appended(conn, events)
        text = statements.claim(conn, SHARD, member="m", owner=1, lines_max=1 << 20, bytes_max=1 << 30)
        assert text is not None
        page = decode_page(text)
        assert len(page.lines) == events
        (plan,) = conn.execute(
            "explain (analyze, buffers, timing off, format json) select durable.page(%s, 1, 1000, 1048576)",
            (page.header.batch,),
        ).fetchone() or ([{}],)
        statements.commit_page(
            conn,
            is_fenced=False,
            shard=SHARD,
            batch=page.header.batch,
            owner=1,
            done=page.cursor(0),
            next_cursor=page.cursor(len(page.lines)),
            is_last=True,
            steps="",
            counts=[],
            outcomes=[],
        )
    assert plan[0]["Plan"]["Shared Hit Blocks"] + plan[0]["Plan"]["Shared Read Blocks"] < BUFFERS_MAX
