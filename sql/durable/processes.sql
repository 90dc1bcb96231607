-- Who is connected and what they hold, for people: nothing is written by processes for it. What other roles' sessions do is told only to
-- an installer that is a member of pg_read_all_stats; else state, waits_for and address are null.

-- durable.processes(): a row a session of ours in this database, and a row each that holds something and has no session any more.
--   role        consumer, supervisor, maintenance; console, list and so on: what a command calls itself; gone: no session
--   home        the shard that a consumer is for; shards: those whose windows it holds now, which may be others too
--   windows     open windows, slow_steps: detached steps that it runs
--   address     from where; null: a socket of the server's own machine, or not told
--   pid         the server's process; seconds: in its state for so long; gone: since its last sign of life
create or replace function durable.processes()
returns table (role text, home int, pid int, address text, since timestamptz, state text, seconds float8, waits_for text, shards int[],
    windows int, slow_steps int)
language sql stable security definer
set search_path = pg_catalog, durable, pg_temp
as $$
    with session as (
        select a.*, substring(a.application_name from '^durable-cluster shard ([0-9]{1,4}) c[0-9a-f]{16}$')::int as home,
            case when a.application_name ~ '^durable-cluster shard [0-9]{1,4} c[0-9a-f]{16}$'
                then ('x' || right(a.application_name, 16))::bit(64)::bigint end as owner
        from pg_stat_activity a
        where a.datname = current_database() and a.application_name like 'durable-cluster %'
    ), held as (
        select w.owner, array_agg(distinct w.shard order by w.shard) as shards, count(*)::int as windows, max(w.active) as active
        from durable.win w group by w.owner
    ), running as (
        select d.owner, count(*)::int as steps
        from (select k.owner from durable.detached k where k.owner <> 0 limit 100001) d group by d.owner
    )
    select case when s.owner is null then substr(s.application_name, 17) else 'consumer' end, s.home, s.pid, host(s.client_addr),
        s.backend_start, s.state, extract(epoch from clock_timestamp() - s.state_change)::float8, s.wait_event, coalesce(h.shards, '{}'),
        coalesce(h.windows, 0), coalesce(r.steps, 0)
    from session s left join held h on h.owner = s.owner left join running r on r.owner = s.owner
    union all
    select 'gone', null, null, null, null, null, extract(epoch from durable.now() - nullif(greatest(g.active, l.active), '-infinity'))::float8,
        null, coalesce(g.shards, '{}'), coalesce(g.windows, 0), coalesce(g.steps, 0)
    from (select * from held full join running using (owner)) g left join durable.lease l on l.owner = g.owner
    where not exists (select from session s where s.owner = g.owner)
    order by 1, 2, 3
$$;

-- durable.slow_steps(limit): detached steps, the longest first, those that wait for room too (is_running: no). Of the first 100,001.
create or replace function durable.slow_steps(i_limit int default 50)
returns table (id text, workflow text, step text, seq int, shard int, is_running boolean, crashes int, since timestamptz)
language sql stable security definer
set search_path = pg_catalog, durable, pg_temp
as $$
    select durable.short(d.id), durable.head_of(d.line, 'f'), durable.head_of(d.line, 's'), d.seq, d.shard, d.owner <> 0, d.crashes, d.since
    from (select k.* from durable.detached k limit 100001) d order by d.since, d.id, d.seq limit least(i_limit, 1000)
$$;
