"""The day on which a test's database stands. Its partitions were made when the run began, which may have been before midnight."""

from __future__ import annotations

from typing import Any

import psycopg


def on_day(conn: psycopg.Connection[Any], days: int) -> None:
    """From now on it is noon, so many days after the one on which the database was laid out, and the clock goes on from there."""
    row = conn.execute(
        "select extract(epoch from date_trunc('day', min(applied_at), 'UTC') + make_interval(hours => 12 + 24 * %s)"
        " - clock_timestamp())::text from durable.migration",
        (days,),
    ).fetchone()
    assert row is not None
    conn.execute(
        "create or replace function durable.now() returns timestamptz language sql volatile"
        f" as $$ select clock_timestamp() + interval '{row[0]} seconds' $$".encode()
    )
