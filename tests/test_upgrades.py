"""An upgraded database is what a fresh one is: whichever version it comes from, and whatever that left in it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest

from durable_cluster import App, Context, Continuation, schema
from durable_cluster import sql as files

Connection = psycopg.Connection[Any]

OURS = "in ('durable', 'pgque')"
IN_OURS = f"::regnamespace::text {OURS}"
LISTINGS = {
    "relations": f"""
        select c.oid::regclass, c.relkind, c.relpersistence, c.relreplident, c.relrowsecurity, c.reloptions, c.relowner::regrole,
            pg_get_expr(c.relpartbound, c.oid), i.inhparent::regclass, obj_description(c.oid, 'pg_class'),
            case when c.relkind = 'v' then pg_get_viewdef(c.oid) end, pg_get_partkeydef(c.oid)
        from pg_class c left join pg_inherits i on i.inhrelid = c.oid where c.relnamespace{IN_OURS}""",
    "columns": f"""
        select a.attrelid::regclass, row_number() over (partition by a.attrelid order by a.attnum), a.attname,
            format_type(a.atttypid, a.atttypmod), a.attnotnull, pg_get_expr(d.adbin, d.adrelid), a.attidentity, a.attgenerated,
            a.attstorage, a.attcompression, a.attcollation::regcollation,
            case when not c.relispartition then col_description(a.attrelid, a.attnum) end
        from pg_attribute a join pg_class c on c.oid = a.attrelid
        left join pg_attrdef d on d.adrelid = a.attrelid and d.adnum = a.attnum
        where c.relnamespace{IN_OURS} and a.attnum > 0 and not a.attisdropped""",
    "constraints": f"""
        select k.conrelid::regclass, k.conname, k.contype, pg_get_constraintdef(k.oid), k.convalidated, k.condeferrable,
            k.conparentid <> 0, obj_description(k.oid, 'pg_constraint')
        from pg_constraint k where k.connamespace{IN_OURS}""",
    "indexes": f"""
        select pg_get_indexdef(x.indexrelid), x.indisvalid, x.indisprimary, x.indisclustered
        from pg_index x join pg_class c on c.oid = x.indexrelid where c.relnamespace{IN_OURS}""",
    "sequences": f"""
        select s.seqrelid::regclass, s.seqtypid::regtype, s.seqstart, s.seqincrement, s.seqmax, s.seqmin, s.seqcache, s.seqcycle,
            (select d.refobjid::regclass || '.' || d.refobjsubid from pg_depend d
             where d.objid = s.seqrelid and d.classid = 'pg_class'::regclass and d.deptype in ('a', 'i'))
        from pg_sequence s join pg_class c on c.oid = s.seqrelid where c.relnamespace{IN_OURS}""",
    "functions": f"""
        select p.oid::regprocedure, p.proowner::regrole, pg_get_functiondef(p.oid), obj_description(p.oid, 'pg_proc')
        from pg_proc p where p.pronamespace{IN_OURS}""",
    "others": f"""
        select 'type', t.oid::regtype::text, t.typtype::text from pg_type t where t.typnamespace{IN_OURS}
        union all select 'trigger', g.tgrelid::regclass::text, pg_get_triggerdef(g.oid) from pg_trigger g
            join pg_class c on c.oid = g.tgrelid where c.relnamespace{IN_OURS}
        union all select 'rule', r.ev_class::regclass::text, pg_get_ruledef(r.oid) from pg_rewrite r
            join pg_class c on c.oid = r.ev_class where c.relnamespace{IN_OURS}
        union all select 'policy', p.polrelid::regclass::text, p.polname from pg_policy p
        union all select 'statistics', s.oid::text, pg_get_statisticsobjdef(s.oid) from pg_statistic_ext s
        union all select 'schema', n.nspname, obj_description(n.oid, 'pg_namespace') from pg_namespace n
            where n.nspname {OURS}""",
    "grants": f"""
        select o.name, g.grantee::regrole, g.grantor::regrole, g.privilege_type, g.is_grantable from (
            select c.oid::regclass::text,
                coalesce(c.relacl, acldefault(case c.relkind when 'S' then 's' else 'r' end::"char", c.relowner))
            from pg_class c where c.relnamespace{IN_OURS} and c.relkind not in ('i', 'I')
            union all select a.attrelid::regclass || '.' || a.attname, a.attacl
            from pg_attribute a join pg_class c on c.oid = a.attrelid where c.relnamespace{IN_OURS} and a.attacl is not null
            union all select p.oid::regprocedure::text, coalesce(p.proacl, acldefault('f', p.proowner)) from pg_proc p
            where p.pronamespace{IN_OURS}
            union all select t.oid::regtype::text, coalesce(t.typacl, acldefault('T', t.typowner)) from pg_type t
            where t.typnamespace{IN_OURS}
            union all select n.nspname, coalesce(n.nspacl, acldefault('n', n.nspowner)) from pg_namespace n
            where n.nspname {OURS}
        ) o(name, acl), aclexplode(o.acl) g""",
    "what it knows of itself": """
        select (to_jsonb(c) - 'installed_at')::text, (select count(*) from durable.slot), (select count(*) from durable.secret),
            (select count(*) from durable.timer_control), (select count(*) from durable.spill_control),
            (select digest from durable.functions) from durable.cluster c
        union all select m.name, null, null, null, null, m.digest from durable.migration m
        union all select s.*::text, null, null, null, null, null from durable.shard s""",
}
"""All that a database has of ours, without the numbers by which it knows it."""

WITH_FEWER_ARGUMENTS = f"""
    select format('create function %s.%I(%s) returns int language sql as ''select 1''', p.pronamespace::regnamespace, p.proname,
        array_to_string(array(
            select p.proargnames[i] || ' ' || format_type(p.proargtypes[i - 1], null)
                || coalesce(' default ' || pg_get_function_arg_default(p.oid, i), '')
            from generate_series(1, p.pronargs - 1) i), ', '))
    from pg_proc p where p.pronamespace{IN_OURS} and p.pronargdefaults > 0"""
"""Of each function whose last argument may be left out, one without it."""

DROPPED = re.compile(r"^drop function if exists (durable|pgque)\.(.+);$", re.MULTILINE)
FUNCTION = re.compile(r"^(?=create or replace )", re.MULTILINE)


def listed(conn: Connection) -> dict[str, set[str]]:
    """Each listing. Partitions are alike on every day: a day's number stands for any, so that none may begin meanwhile."""
    for table in ("audit", "timeline"):  # whose days are made when they are needed
        conn.execute("select durable.add_day(%s, durable.today())", (table,))
    found = {}
    for name, query in LISTINGS.items():
        rows = conn.execute(query.encode()).fetchall()
        assert rows, name
        found[name] = {re.sub(r"\b(\d{5})\b|(?<=_)\d{5}(?=\b|_)", "DAY", str(row)) for row in rows}
    return found


def differences(one: dict[str, set[str]], other: dict[str, set[str]]) -> dict[str, list[str]]:
    return {name: sorted(one[name] ^ other[name]) for name in one if one[name] != other[name]}


@pytest.fixture
def old(empty_dsn: str) -> Iterator[Connection]:
    with psycopg.connect(empty_dsn, autocommit=True) as connection:
        yield connection


@pytest.fixture(scope="module")
def fresh(databases: Any) -> Iterator[dict[str, set[str]]]:
    """What a database has in which nothing was before."""
    name = databases.lend("template0")
    with psycopg.connect(databases.dsn(name), autocommit=True) as connection:
        schema.install(connection, shards=2)
        yield listed(connection)
    databases.take_back(name)


def attempt(conn: Connection, statement: str) -> bool:
    """Whether it could be executed: what is newer than the tables of an old version cannot."""
    try:
        conn.execute(statement.encode())
    except psycopg.ProgrammingError:
        return False
    return True


def make_old(conn: Connection, migrations: int) -> None:
    """A database that an older version has left: its tables, days, grants, and functions that no version has any more.

    Of its other functions those that there still are, as far as they can be made: what they did, an upgrade does not ask.
    """
    conn.execute(
        "create schema durable; create table durable.migration"
        " (name text primary key, digest text not null, applied_at timestamptz not null default now())"
    )
    for name in files.MIGRATIONS[:migrations]:
        conn.execute(files.read("migrations", name).encode())
        conn.execute(
            "insert into durable.migration values (%s, encode(sha256(%s), 'hex'))",
            (name, files.read("migrations", name).encode()),
        )
    for name in files.MIGRATIONS[migrations:]:
        for of, signature in DROPPED.findall(files.read("migrations", name)):
            assert attempt(conn, f"create or replace function {of}.{signature} returns int language sql as 'select 1'")
    conn.execute("set check_function_bodies = off")
    for folder, name in schema.FUNCTIONS:
        if name != "grants":
            for statement in FUNCTION.split(files.read(folder, name)):
                attempt(conn, statement)
    conn.execute("reset check_function_bodies")
    if migrations > 1:
        conn.execute("select durable.lay_out(2); select durable.add_partitions()")
    for table in ("audit", "timeline"):
        attempt(
            conn, f"select durable.add_day('{table}', durable.today()) where to_regclass('durable.{table}') is not null"
        )
    grant_too_much(conn)


def grant_too_much(conn: Connection) -> None:
    """What a version allowed that later ones do not."""
    for name, roles in {
        "durable": "public, durable_client, durable_viewer",
        "pgque": "public, pgque_reader, pgque_writer",
    }.items():
        for kind in ("all tables in", "all sequences in", "all functions in", ""):
            conn.execute(f"grant all on {kind} schema {name} to {roles}".encode())


def demand_working(dsn: str) -> None:
    app = App("upgraded", dsn=dsn)

    @app.machine("one", state=int).step(start=True)
    def only(ctx: Context, n: int) -> Continuation:
        return ctx.done(n)

    handle = app.named("one").start(1, key="k")
    app.run(until_idle=True)
    assert handle.result(timeout=5) == 1
    app.close()


@pytest.mark.parametrize("migrations", range(1, len(files.MIGRATIONS)))
def test_a_database_of_any_older_version_becomes_what_a_fresh_one_is(
    old: Connection, fresh: dict[str, set[str]], migrations: int
) -> None:
    make_old(old, migrations)
    assert schema.install(old, shards=2) == list(files.MIGRATIONS[migrations:])
    assert differences(listed(old), fresh) == {}
    demand_working(old.info.dsn)


def test_functions_that_took_fewer_arguments_are_in_nobodys_way_and_gone_afterwards(
    old: Connection, fresh: dict[str, set[str]]
) -> None:
    """As each of them will be when its next parameter comes: beside it a call without that one is ambiguous."""
    schema.install(old, shards=2)
    fewer = old.execute(WITH_FEWER_ARGUMENTS.encode()).fetchall()
    made = [attempt(old, statement) for (statement,) in fewer]
    assert sum(made) > len(made) / 2 > 10
    grant_too_much(old)
    assert schema.install(old, shards=2) == []
    assert differences(listed(old), fresh) == {}
    demand_working(old.info.dsn)
