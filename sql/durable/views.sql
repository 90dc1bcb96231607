-- durable.line_pattern(field): what finds one of the fields w, n, f, s at the head of an envelope. The state behind them is the
-- user's and is not looked into: it may hold anything, characters too that no text of Postgres can.
create or replace function durable.line_pattern(i_field text) returns text
language sql immutable parallel safe
as $$
    select '^\{"w":"' || case i_field when 'w' then '([0-9a-f]{32})' else '[0-9a-f]{32}' end
        || '","n":' || case i_field when 'n' then '([0-9]{1,9})' else '[0-9]{1,9}' end
        || ',"f":"' || case i_field when 'f' then '([a-z0-9_.-]+)' else '[a-z0-9_.-]+' end
        || '","s":"' || case i_field when 's' then '([a-z0-9_.-]+)' else '[a-z0-9_.-]+' end || '"'
$$;

-- durable.standing(id): the unfinished step events of a live workflow, whole: payloads. Looks at open windows from their cursors on and
-- at what no tick covers yet, so it costs what the backlog of one shard costs, never history; then at what is not in the log.
--   place     see durable.locate; progress: what a step that runs beside the pages last said
create or replace function durable.standing(i_id uuid)
returns table (shard int, place text, line text, owner_is_silent boolean, due timestamptz, progress text)
language plpgsql stable security definer
set search_path = pg_catalog, durable, pg_temp
as $$
declare
    v_shard durable.shard;
    v_win record;
begin
    select s.* into v_shard from durable.slot l join durable.shard s using (shard) where l.slot = durable.slot_of(i_id);
    for v_win in
        select 'claimed' as place, w.s0, w.s1, w.done, w.active = '-infinity' as silent from durable.win w where w.shard = v_shard.shard
        union all
        (select 'queued', t.tick_snapshot, pg_current_snapshot(), row('0'::xid8, 0, 0)::durable.cursor, false
         from pgque.tick t where t.tick_queue = v_shard.queue_id order by t.tick_id desc limit 1)
    loop
        return query execute
            'select $8, $9, l.line, $10, null::timestamptz, null'
            ' from ('
            || durable.window_query(pgque.event_tables(v_shard.queue_id, v_win.s0), true, null)
            || ') e, string_to_table(e.body, E''\n'') with ordinality l(line, o)'
               ' where e.body like ''%'' || $11 and l.line like $11 and not (e.txid = $3 and e.id = $4 and l.o <= $12)'
            using (durable.range_begin(v_win.done, v_win.s0)).txid, (durable.range_begin(v_win.done, v_win.s0)).id,
                (v_win.done).txid, (v_win.done).id, pg_snapshot_xmax(v_win.s1), v_win.s1,
                array(select x from pg_snapshot_xip(v_win.s0) x where pg_visible_in_snapshot(x, v_win.s1)),
                v_shard.shard, v_win.place, v_win.silent, '{"w":"' || durable.hex(i_id) || '"%', (v_win.done).line;
    end loop;
    return query
        select v_shard.shard, a.place, a.line, a.is_silent, a.due, a.progress from (
            select case when w.names is null then 'sleeping' when w.names = '{}' then 'joining' else 'waiting' end as place, w.line,
                false as is_silent, nullif(w.due, 'infinity') as due, null as progress
            from durable.wait w where w.id = i_id
            union all
            -- A timer that carries its line is due within a minute: the look is short.
            (select 'sleeping', t.line, false, t.due, null from durable.timer_control c, durable.timer t
             where (t.due, t.id) > (c.reached_due, c.reached_id) and t.due < durable.timer_now() + interval '2 minutes'
                and t.workflow_id = i_id and t.line is not null)
            union all
            select 'detached', d.line, d.owner = 0, null, d.progress from durable.detached d where d.id = i_id
            union all
            select 'limited', q.line, false, null, null from durable.queued q where q.id = i_id
            union all
            select 'paused', p.line, false, null, null from durable.parked p where p.id = i_id
            union all
            select 'stuck', d.line, false, null, null from durable.dead_letter d where d.id = i_id) a;
end
$$;

-- durable.locate(id): where a live workflow stands: its unfinished step events.
--   place  queued, claimed, sleeping (until due), waiting (for a signal) or joining (its children) until due at the latest, detached,
--          limited (no permit yet), paused, or stuck (a dead letter)
create or replace function durable.locate(i_id uuid)
returns table (shard int, place text, step text, seq int, owner_is_silent boolean, due timestamptz)
language sql stable security definer
set search_path = pg_catalog, durable, pg_temp
as $$
    select s.shard, s.place, substring(s.line from durable.line_pattern('s')), substring(s.line from durable.line_pattern('n'))::int,
        s.owner_is_silent, s.due
    from durable.standing(i_id) s
    where s.line ~ durable.line_pattern('s')  -- a signal or a cancel on its way is no step
$$;

-- durable.log(shard): the retained log of one shard, a row a step event, for people; ids are truncated.
create or replace function durable.log(i_shard int)
returns table (txid xid8, event_id bigint, line bigint, at timestamptz, id text, workflow text, step text, seq int)
language plpgsql stable security definer
set search_path = pg_catalog, durable, pg_temp
as $$
begin
    return query execute format(
        'select e.ev_txid, e.ev_id, l.o, e.ev_time, left(substring(l.line from durable.line_pattern(''w'')), 12),'
        ' substring(l.line from durable.line_pattern(''f'')), substring(l.line from durable.line_pattern(''s'')),'
        ' substring(l.line from durable.line_pattern(''n''))::int'
        ' from %s e, string_to_table(e.ev_data, E''\n'') with ordinality l(line, o)'
        ' where e.ev_type is distinct from ''history'' order by e.ev_txid, e.ev_id, l.o',
        (select q.queue_data_pfx from pgque.queue q where q.queue_name = durable.queue_of(i_shard)));
end
$$;

-- durable.by_prefix(hex): the ids that begin with these hex digits, three at the most (one, none, or ambiguous).
create or replace function durable.by_prefix(i_hex text) returns setof uuid
language sql stable security definer
set search_path = pg_catalog, durable, pg_temp
as $$
    select s.id from durable.started s
    where s.id between rpad(i_hex, 32, '0')::uuid and rpad(i_hex, 32, 'f')::uuid order by s.id limit 3
$$;

-- durable.shard_status(): one row a shard: what waits in its log, who reads it, how old its newest tick is.
create or replace function durable.shard_status()
returns table (shard int, has_work boolean, windows int, silent_windows int, consumers int, is_idle boolean, tick_age interval)
language sql stable security definer
set search_path = pg_catalog, durable, pg_temp
as $$
    select s.shard, durable.has_events(s.queue_id),
        (select count(*)::int from durable.win w where w.shard = s.shard),
        (select count(*)::int from durable.win w where w.shard = s.shard and w.active = '-infinity'),
        (select count(*)::int from pg_stat_activity a
         where a.datname = current_database() and a.application_name like 'durable-cluster shard ' || s.shard || ' %'),
        durable.is_asleep(s.shard),
        (select clock_timestamp() - t.tick_time from pgque.tick t where t.tick_queue = s.queue_id order by t.tick_id desc limit 1)
    from durable.shard s order by s.shard
$$;

-- durable.asides(): what is not in the log: long sleepers, workflows that wait for a signal and for children, detached steps that run
-- and that wait for room, dead letters, each counted up to 100,001; and seconds until the next timer is due (null: none waits).
create or replace function durable.asides(out sleeping bigint, out awaiting bigint, out joining bigint, out running bigint, out waiting bigint,
    out dead_letters bigint, out due_s float8)
language sql stable security definer
set search_path = pg_catalog, durable, pg_temp
as $$
    select (select count(*) from (select from durable.wait w where w.names is null limit 100001) w),
        (select count(*) from (select from durable.wait w where w.names <> '{}' limit 100001) w),
        (select count(*) from (select from durable.wait w where w.names = '{}' limit 100001) w),
        (select count(*) from (select from durable.detached d where d.owner <> 0 limit 100001) d),
        (select count(*) from (select from durable.detached d where d.owner = 0 limit 100001) d),
        (select count(*) from (select from durable.dead_letter limit 100001) d),
        durable.next_due()
$$;

-- durable.totals(): workflows by type and status. Reads lifecycle rows of the retained days: for people, not for polls.
create or replace function durable.totals() returns table (workflow text, status text, workflows bigint)
language sql stable security definer
set search_path = pg_catalog, durable, pg_temp
as $$
    select s.workflow,
        coalesce(f.status, case when s.id in (select d.id from durable.dead_letter d) then 'stuck' else 'running' end), count(*)
    from durable.started s left join durable.finished f on f.id = s.id and f.day = s.day
    group by 1, 2 order by 1, 2
$$;

-- durable.row_changes(): rows updated and deleted so far, per table of ours. What "append-only" is measured by.
create or replace function durable.row_changes() returns table (relation text, updated bigint, deleted bigint, dead bigint)
language sql volatile
as $$
    select t.schemaname || '.' || t.relname, t.n_tup_upd, t.n_tup_del, t.n_dead_tup
    from pg_stat_user_tables t where t.schemaname in ('durable', 'pgque') order by 1
$$;
