-- What the console looks at again and again: each look costs what has happened since the last one, or what is unfinished; never history.

-- durable.pulse(since): what has happened.
--   i_since   the snapshot of the look before; null: there was none
-- Result: the snapshot of this one; the step events that were appended between the two, null if there was no look before, or if more
-- log entries came since than a look may count; workflows started and ended so far, as the server counts rows, a second late: the
-- difference of two looks is what counts; seconds until the next timer is due, null if there is none.
create or replace function durable.pulse(i_since pg_snapshot default null, out snapshot pg_snapshot, out at timestamptz, out appended bigint,
    out started bigint, out ended bigint, out due_s float8)
language plpgsql stable security definer
set search_path = pg_catalog, durable, pg_temp
as $$
declare
    v_entries_max constant int := 20000;
    v_entries int;
    v_lines bigint;
    v_table text;
begin
    snapshot := pg_current_snapshot();
    at := clock_timestamp();
    due_s := durable.next_due();
    started := (select sum(pg_stat_get_tuples_inserted(i.inhrelid)) from pg_inherits i where i.inhparent = 'durable.started'::regclass);
    ended := (select sum(pg_stat_get_tuples_inserted(i.inhrelid)) from pg_inherits i where i.inhparent = 'durable.finished'::regclass);
    if i_since is null then
        return;
    end if;
    appended := 0;
    for v_table in select t from durable.shard s, unnest(pgque.event_tables(s.queue_id, i_since)) t loop
        -- What began after that look, and what was under way then and has been committed since: see durable.window_query.
        execute format('select count(*), sum(case when e.ev_extra1 ~ ''^[0-9]{1,4}$'' then e.ev_extra1::int else 1 end) from ('
            'select ev_extra1 from %1$s where ev_txid >= $1 and ev_type is distinct from ''history'''
            ' union all select ev_extra1 from %1$s where ev_txid = any ($2) and ev_type is distinct from ''history'' limit $3) e', v_table)
            into v_entries, v_lines
            using pg_snapshot_xmax(i_since), array(select pg_snapshot_xip(i_since)), v_entries_max;
        if v_entries = v_entries_max then
            appended := null;
            return;
        end if;
        appended := appended + coalesce(v_lines, 0);
    end loop;
end
$$;

-- durable.recent_ends(limit): the workflows that failed or were cancelled last, newest first, ids truncated.
--   reason   the beginning of it; null where a codec has made it
create or replace function durable.recent_ends(i_limit int default 10)
returns table (id text, workflow text, status text, reason text, started_at timestamptz, ended_at timestamptz)
language sql stable security definer
set search_path = pg_catalog, durable, pg_temp
as $$
    -- Each status by itself: the index has them apart, and each in the order of time.
    select durable.short(f.id), s.workflow, f.status, left(durable.unveiled(durable.veiled(f.output)::json ->> 'reason'), 200), s.at, f.at
    from ((select * from durable.finished x where x.status = 'failed' order by x.at desc limit i_limit)
          union all
          (select * from durable.finished x where x.status = 'cancelled' order by x.at desc limit i_limit)) f
    join durable.started s on s.id = f.id and s.day = f.day
    order by f.at desc limit i_limit
$$;

-- durable.known(id): what is known of a workflow but for its payloads; nothing for an unknown one. Ids truncated.
--   since    since when it stands where it does, where that is known; finished: null
--   paused   what of it is: the workflow, its type or its shard
create or replace function durable.known(i_id uuid)
returns table (workflow text, version int, status text, key text, started_at timestamptz, finished_at timestamptz, since timestamptz,
    parent text, origin text, weight float8, paused text, attributes jsonb, is_linear boolean)
language sql stable security definer
set search_path = pg_catalog, durable, pg_temp
as $$
    select s.workflow, s.version,
        coalesce(f.status, case when exists (select from durable.dead_letter d where d.id = i_id) then 'stuck' else 'running' end),
        s.key, s.at, f.at,
        case when f.id is null then coalesce(
            (select max(d.at) from durable.dead_letter d where d.id = i_id), (select max(w.since) from durable.wait w where w.id = i_id),
            (select max(d.since) from durable.detached d where d.id = i_id), (select max(p.since) from durable.parked p where p.id = i_id)) end,
        durable.short(s.parent), durable.short(s.origin), coalesce((select p.weight from durable.priority p where p.id = i_id), 1),
        case when f.id is not null then null
            when exists (select from durable.pause p where p.scope = 'workflow' and p.name = durable.hex(i_id)) then 'workflow'
            when exists (select from durable.pause p where p.scope = 'type' and p.name = s.workflow) then 'type'
            when (select h.is_paused from durable.slot l join durable.shard h using (shard) where l.slot = durable.slot_of(i_id)) then 'shard' end,
        coalesce((select a.attributes from durable.attribute a where a.id = i_id), '{}'),
        durable.is_linear(s.workflow)
    from durable.started s left join durable.finished f on f.id = s.id and f.day = s.day
    where s.id = i_id and s.day = durable.day_of(i_id)
$$;

-- durable.input_of(id): what a workflow was started with, as JSON. A payload: not for operators.
create or replace function durable.input_of(i_id uuid) returns text
language sql stable security definer
set search_path = pg_catalog, durable, pg_temp
as $$ select s.input from durable.started s where s.id = i_id and s.day = durable.day_of(i_id) $$;

-- durable.family(id, depth, each): the descendants of a workflow, a child followed by its own; ids truncated.
--   i_each    so many children of each at the most
-- Result: depth from 1; children, ended: of its own last group, null if it never had any
create or replace function durable.family(i_id uuid, i_depth int default 3, i_each int default 20)
returns table (depth int, id text, workflow text, status text, started_at timestamptz, finished_at timestamptz, children int, ended int)
language sql stable security definer
set search_path = pg_catalog, durable, pg_temp set jit = off
as $$
    with recursive tree as (
        select 1 as depth, c.id, c.day, c.workflow, c.at, array[c.parent_seq, c.number] as path
        from (select s.* from durable.started s where s.parent = i_id order by s.parent_seq, s.number limit least(i_each, 100)) c
        union all
        select t.depth + 1, c.id, c.day, c.workflow, c.at, t.path || c.parent_seq || c.number
        from tree t cross join lateral (
            select s.* from durable.started s where s.parent = t.id order by s.parent_seq, s.number limit least(i_each, 100)) c
        where t.depth < least(i_depth, 5)
    )
    select t.depth, durable.short(t.id), t.workflow,
        coalesce(f.status, case when exists (select from durable.dead_letter d where d.id = t.id) then 'stuck' else 'running' end),
        t.at, f.at, g.total, g.completed + g.failed
    from (select * from tree order by path limit 200) t
    left join durable.finished f on f.id = t.id and f.day = t.day
    left join durable.fanout g on g.id = t.id
    order by t.path
$$;
