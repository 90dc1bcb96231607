-- The timeline: what became of each step of the workflows that are recorded. The page that runs such a step appends a record of it to the
-- log, an event of type history, in its own transaction; the readers of steps pass it by. A second reader of each shard's log, registered
-- while anything is recorded, projects the records into durable.timeline. It is no part of the path of a step, and if it falls behind it
-- loses its place: see durable.skip_timelines.

-- durable.timeline_reader(shard): the name the engine knows that reader by. One a shard: names are locked globally.
create or replace function durable.timeline_reader(i_shard int) returns text
language sql immutable parallel safe
as $$ select 'durable_' || i_shard || '_timeline' $$;

-- durable.is_recorded(id, share): whether a workflow is among the recorded part of its type; cluster/timed.py asks the same.
create or replace function durable.is_recorded(i_id uuid, i_share float8) returns boolean
language sql immutable parallel safe
as $$ select ('x' || substr(durable.hex(i_id), 13, 8))::bit(32)::bigint < round(i_share * 4294967296) $$;

-- durable.has_timeline(): whether any type of workflow is recorded.
create or replace function durable.has_timeline() returns boolean
language sql stable
set search_path = pg_catalog, durable, pg_temp
as $$ select exists (select from durable.workflow_type t where t.history > 0) $$;

-- durable.keep_readers(): registers the readers while anything is recorded, and makes days for what they write; takes them away when nothing is
-- any more, so that they hold no log back. How many changes. A reader begins at the newest tick: it has to be there before the first record.
create or replace function durable.keep_readers() returns int
language plpgsql
set search_path = pg_catalog, durable, pg_temp
as $$
declare
    v_has boolean := durable.has_timeline();
    v_shard durable.shard;
    v_done int := 0;
begin
    for v_shard in select s.* from durable.shard s
        where exists (select from pgque.consumer c where c.co_name = durable.timeline_reader(s.shard)) <> v_has order by s.shard
    loop
        if v_has then
            v_done := v_done + pgque.register_consumer(v_shard.queue, durable.timeline_reader(v_shard.shard));
        else
            v_done := v_done + pgque.unregister_consumer(v_shard.queue, durable.timeline_reader(v_shard.shard));
        end if;
    end loop;
    if v_has then
        v_done := v_done + (select sum(durable.add_day('timeline', d)) from generate_series(durable.today(), durable.today() + 14) d);
    end if;
    return v_done;
end
$$;

-- durable.record_steps(shard, body, n): a page's or a completion's n records, in its transaction; made by cluster/timeline.py.
-- The times in them are relative: what the database's clock shows now goes before them.
create or replace function durable.record_steps(i_shard int, i_body text, i_n int) returns void
language sql volatile security definer
set search_path = pg_catalog, durable, pg_temp
as $$
    select pgque.insert_event(durable.queue_of(i_shard), 'history', extract(epoch from durable.now()) || E'\n' || i_body, i_n::text, null, null, null)
$$;

-- durable.timeline_records(body): the records of one event, a row each; none, and a warning, for what is not one of durable.record_steps:
-- somebody may have appended it by hand, and a reader must not stop at it.
create or replace function durable.timeline_records(i_body text)
returns table (at timestamptz, id uuid, seq int, part int, step text, attempt int, began_at timestamptz, ended_at timestamptz, outcome text,
    error text, waits_for text, until timestamptz, source_txid xid8, source_id bigint, process text)
language plpgsql stable
set search_path = pg_catalog, durable, pg_temp
as $$
declare
    v_at timestamptz;
    v_said json;
    v_process text;  -- read once: to look into the whole for each record would take a second for a page of them
begin
    v_at := to_timestamp(split_part(i_body, E'\n', 1)::float8);
    v_said := substr(i_body, strpos(i_body, E'\n') + 1)::json;
    v_process := v_said ->> 'p';
    return query
        select v_at, r.w::uuid, r.n, coalesce(r.k, 0), r.s, coalesce(r.a, 1), v_at - r.b * interval '1 microsecond',
            v_at - r.e * interval '1 microsecond', r.o, left(r.x, 200), left(r.f, 200), v_at + r.u * interval '1 second',
            r.t::xid8, r.i, v_process
        from json_to_recordset(v_said -> 'r') r(w text, n int, k int, s text, a int, b bigint, e bigint, o text, x text, f text, u float8,
            t text, i bigint)
        where r.w is not null and r.n is not null and r.s is not null and r.o is not null;
exception when data_exception or program_limit_exceeded then
    raise warning 'an event of the timeline cannot be read (%); it is passed over', sqlerrm;
end
$$;

-- durable.timeline_position(shard): the tick the shard's reader stands at and when that was, the newest tick, and the first one it has not
-- read; no row without a reader. Reads only.
create or replace function durable.timeline_position(i_shard int, out reached bigint, out reached_at timestamptz, out newest bigint, out newest_at timestamptz,
    out unread_at timestamptz)
returns setof record
language sql stable
set search_path = pg_catalog, durable, pg_temp
as $$
    select i.last_tick, r.tick_time, n.tick_id, n.tick_time,
        (select u.tick_time from pgque.tick u where u.tick_queue = s.queue_id and u.tick_id > i.last_tick order by u.tick_id limit 1)
    from durable.shard s
    cross join lateral pgque.get_consumer_info(s.queue, durable.timeline_reader(s.shard)) i
    join pgque.tick r on r.tick_queue = s.queue_id and r.tick_id = i.last_tick
    cross join lateral (select t.tick_id, t.tick_time from pgque.tick t where t.tick_queue = s.queue_id order by t.tick_id desc limit 1) n
    where s.shard = i_shard
$$;

-- durable.unread_timelines(): the shards whose readers have something to read; null where nothing is recorded. Reads only.
create or replace function durable.unread_timelines() returns int[]
language sql stable security definer
set search_path = pg_catalog, durable, pg_temp
as $$
    select case when durable.has_timeline() then array(
        select s.shard from durable.shard s cross join lateral durable.timeline_position(s.shard) p
        where p.reached < p.newest order by s.shard) end
$$;

-- durable.history_lag(): for how many seconds the oldest part of the log that is not projected has been ready; 0: all is; null: nothing is
-- recorded. Reads only.
create or replace function durable.history_lag() returns float8
language sql stable security definer
set search_path = pg_catalog, durable, pg_temp
as $$
    select max(coalesce(greatest(extract(epoch from clock_timestamp() - p.unread_at)::float8, 0), 0))
    from durable.shard s cross join lateral durable.timeline_position(s.shard) p
$$;

-- durable.next_timeline_batch(shard, span): the reader's next window, of so much time at the most and, where the log has less, of all there
-- is; nulls when there is nothing. The caller holds the reader's lock.
-- A window is asked for by its least width: that of all there is, or the span.
create or replace function durable.next_timeline_batch(i_shard int, i_span interval, out batch bigint, out s0 pg_snapshot, out s1 pg_snapshot,
    out since timestamptz, out until timestamptz)
language plpgsql
set search_path = pg_catalog, durable, pg_temp
as $$
declare
    v_position record;
    v_queue text := durable.queue_of(i_shard);
    v_window record;
begin
    select * into v_position from durable.timeline_position(i_shard);
    if not found or v_position.reached >= v_position.newest then
        return;
    end if;
    select * into v_window from pgque.next_batch_custom(v_queue, durable.timeline_reader(i_shard), null, null,
        least(v_position.newest_at - v_position.reached_at, i_span));
    if v_window.batch_id is null then
        return;
    end if;
    batch := v_window.batch_id;
    since := v_window.prev_tick_time;
    until := v_window.cur_tick_time;
    select p.tick_snapshot, n.tick_snapshot into s0, s1
    from durable.shard s
    join pgque.tick p on p.tick_queue = s.queue_id and p.tick_id = v_window.prev_tick_id
    join pgque.tick n on n.tick_queue = s.queue_id and n.tick_id = v_window.cur_tick_id
    where s.shard = i_shard;
end
$$;

-- durable.end_timeline_batch(batch): in the transaction that has projected it. Of two who have, one raises, and rolls back.
create or replace function durable.end_timeline_batch(i_batch bigint) returns void
language plpgsql
set search_path = pg_catalog, durable, pg_temp
as $$
begin
    if pgque.finish_batch(i_batch) <> 1 then
        perform durable.lost(i_batch);
    end if;
end
$$;

-- durable.project_timeline(shard, span): projects one window of the log, if nobody else does. How many records; null: there was nothing.
-- The window is taken, projected and finished in one transaction: whoever dies in the middle has projected nothing.
-- Tables: timeline (a row a record), batch and batch_end in the engine.
create or replace function durable.project_timeline(i_shard int, i_span interval default '1 second') returns bigint
language plpgsql security definer
set search_path = pg_catalog, durable, pg_temp
as $$
declare
    v_window record;
    v_log record;
    v_late xid8[];
    v_begin durable.cursor;
    v_rows bigint;
begin
    perform durable.demand_read_committed();
    if not durable.try_maintenance('timeline ' || i_shard) then
        return null;
    end if;
    -- Later than the lock: it has to see what was finished before.
    select * into v_window from durable.next_timeline_batch(i_shard, i_span);
    if v_window.batch is null then
        return null;
    end if;
    select q.queue_id, q.queue_data_pfx as events into v_log from pgque.queue q where q.queue_name = durable.queue_of(i_shard);
    v_late := array(select x from pg_snapshot_xip(v_window.s0) x where pg_visible_in_snapshot(x, v_window.s1));
    v_begin := durable.range_begin(row('0'::xid8, 0, 0)::durable.cursor, v_window.s0);
    -- When a step became runnable is when the event was appended that it stood in. That is in the log as long as the record is.
    execute
        'insert into durable.timeline (day, id, seq, part, step, attempt, enqueued_at, began_at, ended_at, outcome, error, waits_for, until, shard, process)'
        ' select durable.day_at(r.at), r.id, r.seq, r.part, r.step, r.attempt,'
        '  case when s.ev_time is not null then least(s.ev_time + $8, coalesce(r.began_at, r.ended_at)) end,'
        '  r.began_at, r.ended_at, r.outcome, r.error, r.waits_for, r.until, $9, r.process'
        ' from (' || durable.window_query(pgque.event_tables(v_log.queue_id, v_window.s0), v_late <> '{}', null, 'history') || ') e'
        ' cross join lateral durable.timeline_records(e.body) r'
        ' left join lateral (select v.ev_time from ' || v_log.events || ' v'
        '  where v.ev_txid = r.source_txid and v.ev_id = r.source_id and r.part = 0 limit 1) s on true'
        using v_begin.txid, v_begin.id, '0'::xid8, 0::bigint, pg_snapshot_xmax(v_window.s1), v_window.s1, v_late,
            durable.now() - clock_timestamp(), i_shard;
    get diagnostics v_rows = row_count;
    perform durable.end_timeline_batch(v_window.batch);
    return v_rows;
end
$$;

-- durable.skip_timeline(shard): passes over all that the reader has not read, and says so in durable.timeline_skip; no row where somebody
-- reads just now, or nothing is left. records: how many are missing from the timeline; null: in more than 10,000 events.
create or replace function durable.skip_timeline(i_shard int)
returns table (shard int, since timestamptz, until timestamptz, records bigint)
language plpgsql
set search_path = pg_catalog, durable, pg_temp
as $$
#variable_conflict use_column
declare
    v_window record;
    v_queue_id int := (select s.queue_id from durable.shard s where s.shard = i_shard);
    v_late xid8[];
    v_begin durable.cursor;
    v_records bigint;
begin
    if not durable.try_maintenance('timeline ' || i_shard) then
        return;
    end if;
    select * into v_window from durable.next_timeline_batch(i_shard, '1000 years');
    if v_window.batch is null then
        return;
    end if;
    v_late := array(select x from pg_snapshot_xip(v_window.s0) x where pg_visible_in_snapshot(x, v_window.s1));
    v_begin := durable.range_begin(row('0'::xid8, 0, 0)::durable.cursor, v_window.s0);
    execute 'select case when count(*) <= 10000 then coalesce(sum(case when e.n ~ ''^[0-9]{1,6}$'' then e.n::int else 1 end), 0) end from ('
        || durable.window_query(pgque.event_tables(v_queue_id, v_window.s0), v_late <> '{}', 10001, 'history') || ') e'
        into v_records
        using v_begin.txid, v_begin.id, '0'::xid8, 0::bigint, pg_snapshot_xmax(v_window.s1), v_window.s1, v_late;
    perform durable.end_timeline_batch(v_window.batch);
    return query insert into durable.timeline_skip (shard, since, until, records, at)
        values (i_shard, v_window.since, v_window.until, v_records, durable.now()) returning shard, since, until, records;
end
$$;

-- durable.skip_timelines(lag_s): as skip_timeline, for the readers that are so many seconds behind: as long as one stands somewhere, nothing of
-- the log behind it can be emptied. Asked by maintenance, and again by each rotation.
create or replace function durable.skip_timelines(i_lag_s float8) returns table (shard int, since timestamptz, until timestamptz, records bigint)
language sql volatile security definer
set search_path = pg_catalog, durable, pg_temp
as $$
    -- Materialized: whom nothing is late for must not be passed over, in whatever order a plan would join.
    with late as materialized (
        select s.shard from durable.shard s cross join lateral durable.timeline_position(s.shard) p
        where p.unread_at < clock_timestamp() - make_interval(secs => i_lag_s)
    )
    select k.* from late l cross join lateral durable.skip_timeline(l.shard) k
$$;

-- durable.timeline_skips(limit): what was left out, newest first.
create or replace function durable.timeline_skips(i_limit int default 50)
returns table (shard int, since timestamptz, until timestamptz, records bigint, at timestamptz)
language sql stable security definer
set search_path = pg_catalog, durable, pg_temp
as $$ select k.shard, k.since, k.until, k.records, k.at from durable.timeline_skip k order by k.at desc limit i_limit $$;

-- durable.expired_timeline(days): the oldest day of the timeline that has a partition and is over by more than so many days; null: none.
create or replace function durable.expired_timeline(i_days int) returns int
language sql stable
set search_path = pg_catalog, durable, pg_temp
as $$
    select min(p.day) from (
        select substring(c.relname from '_([0-9]+)$')::int as day
        from pg_inherits i join pg_class c on c.oid = i.inhrelid where i.inhparent = 'durable.timeline'::regclass) p
    where p.day < durable.today() - i_days
$$;

-- durable.needs_timeline_upkeep(days): a read that tells whether durable.keep_timeline has something to do.
create or replace function durable.needs_timeline_upkeep(i_days int) returns boolean
language sql stable security definer
set search_path = pg_catalog, durable, pg_temp
as $$
    select (durable.has_timeline() and to_regclass('durable.timeline_' || (durable.today() + 7)) is null)
        or exists (select from durable.shard s
                   where exists (select from pgque.consumer c where c.co_name = durable.timeline_reader(s.shard)) <> durable.has_timeline())
        or durable.expired_timeline(i_days) is not null
        or exists (select from durable.timeline_default t where t.day < (select durable.today() - i_days))
        or exists (select from durable.timeline_skip k where k.at < (select durable.expired_before(i_days)))
$$;

-- durable.keep_timeline(days): readers and days ahead as durable.keep_readers has them, and one expired day gone. How many changes.
-- The caller sets lock_timeout: who reads or writes holds a lock that a drop waits for.
create or replace function durable.keep_timeline(i_days int) returns int
language plpgsql security definer
set search_path = pg_catalog, durable, pg_temp
as $$
declare
    v_day int := durable.expired_timeline(i_days);
    v_done int;
begin
    if i_days is null or i_days not between 1 and 36500 then
        raise exception 'a timeline of % days is out of range; choose 1 to 36500', coalesce(i_days::text, 'null') using errcode = 'DC002';
    end if;
    if not durable.try_maintenance('timeline') then
        return 0;
    end if;
    v_done := durable.keep_readers();
    if v_day is not null then
        execute format('drop table durable.timeline_%s', v_day);
        v_done := v_done + 1;
    end if;
    delete from durable.timeline_default t where t.day < durable.today() - i_days;
    delete from durable.timeline_skip k where k.at < durable.expired_before(i_days);
    return v_done;
end
$$;

-- durable.timeline_head(id): what a timeline is of: one row for a known workflow, none for an unknown one.
--   id           the first 12 digits
--   has_history  whether its steps are recorded: it is among the recorded part of its type, or something of it is there
--   lag_s        so many seconds of the newest may not be there yet; null: nothing is recorded in this database
--   skips        how often, while it lived, its shard's reader left something out: the timeline may have gaps
create or replace function durable.timeline_head(i_id uuid)
returns table (id text, workflow text, version int, status text, started_at timestamptz, finished_at timestamptz, has_history boolean, lag_s float8,
    skips int)
language sql stable security definer
set search_path = pg_catalog, durable, pg_temp
as $$
    select durable.short(i_id), s.workflow, s.version, s.status, s.started_at, s.finished_at,
        exists (select from durable.workflow_type t where t.workflow = s.workflow and durable.is_recorded(i_id, t.history))
            or exists (select from durable.timeline t where t.id = i_id and t.day >= durable.day_at(s.started_at)),
        durable.history_lag(),
        (select count(*)::int from durable.timeline_skip k join durable.slot l on l.shard = k.shard
         where l.slot = durable.slot_of(i_id) and k.until >= s.started_at and k.since <= coalesce(s.finished_at, 'infinity'))
    from durable.state_of(i_id) s
$$;

-- durable.timeline_standing(id): where a live workflow stands, in the form of the rows of durable.timeline_of, without payloads.
create or replace function durable.timeline_standing(i_id uuid)
returns table (seq int, step text, attempt int, enqueued_at timestamptz, began_at timestamptz, outcome text, error text, waits_for text,
    until timestamptz, shard int)
language sql stable
set search_path = pg_catalog, durable, pg_temp
as $$
    select q.seq, substring(q.line from durable.line_pattern('s')), durable.attempt_of(q.line),
        coalesce(w.since, p.since, d.at), case when x.owner <> 0 then x.since end, q.place, left(d.details::jsonb ->> 'reason', 200),
        case q.place
            when 'waiting' then 'signal ' || array_to_string(w.names, ', ')
            when 'joining' then (f.total - f.completed - f.failed) || ' children'
            when 'limited' then 'limit ' || l.name end,
        q.due, q.shard
    from (select s.*, substring(s.line from durable.line_pattern('n'))::int as seq from durable.standing(i_id) s) q
    left join durable.wait w on w.id = i_id and q.place in ('sleeping', 'waiting', 'joining')
    left join durable.parked p on p.id = i_id and q.place = 'paused'
    left join durable.dead_letter d on d.id = i_id and d.seq = q.seq and q.place = 'stuck'
    left join durable.detached x on x.id = i_id and x.seq = q.seq and q.place = 'detached'
    left join durable.fanout f on f.id = i_id and q.place = 'joining'
    left join durable.queued l on l.id = i_id and q.place = 'limited'
$$;

-- durable.timeline_of(id): a workflow's timeline: its start; what is recorded of its steps; where it stands; its end. Without payloads.
-- Of a workflow that is not recorded: its start, where it stands, its end. No row for an unknown id.
--   seq, step    the step event; null for the start and the end of the workflow
--   part         0; from 1 on: a step that ran within that event, as those of linear workflows that run ahead, or several at once
--   enqueued_at  when the event stood in the log, ready to run; until began_at it waited for its turn
--   began_at, ended_at  of the handler, by the database's clock; nothing began: it did not run; nothing ended: it goes on
--   outcome      started                        the workflow has begun
--                continued                      and went on to another step
--                sleeping, waiting, joining     and sleeps, waits for a signal, waits for its children, until
--                retrying, failed, stuck        its attempt failed (error): again at until; its workflow was told; it is a dead letter
--                completed, failed, cancelled   and ended the workflow; without a step: the workflow has ended
--                detached                       goes on beside the pages
--                limited, paused, unrouted      did not run: no permit, a pause, no code that knows it (again at until)
--                queued, claimed                stands in the log, or in an open window
--   waits_for    what it waits for, where that is a signal, children or a limit
--   error        at most 200 characters
create or replace function durable.timeline_of(i_id uuid)
returns table (seq int, part int, step text, attempt int, enqueued_at timestamptz, began_at timestamptz, ended_at timestamptz, outcome text,
    error text, waits_for text, until timestamptz, shard int, process text)
language sql stable security definer
set search_path = pg_catalog, durable, pg_temp
as $$
    with head as materialized (
        select s.status, s.started_at, s.finished_at from durable.state_of(i_id) s
    ), recorded as (
        -- What went on beside the pages has two records: how it began, which says when it became runnable, and how it ended. They are
        -- brought together by one sort: a join would look through all of the records for each of them, where it expects few.
        select t.*,
            case when t.part = 0 and t.outcome <> 'detached' then min(t.enqueued_at) filter (where t.outcome = 'detached') over event end
                as was_enqueued_at,
            case when t.part = 0 and t.outcome <> 'detached' then min(t.began_at) filter (where t.outcome = 'detached') over event end as had_begun_at,
            max(t.ended_at) filter (where t.part = 0 and t.outcome <> 'detached') over event as has_ended_at
        from durable.timeline t
        where t.id = i_id and t.day >= (select durable.day_at(h.started_at) from head h)
        window event as (partition by t.seq)
    ), known as (
        select r.seq, r.part, r.step, r.attempt,
            -- The log says when a transaction began, which for that of the start is a moment earlier.
            case when coalesce(r.enqueued_at, r.was_enqueued_at) < h.started_at then h.started_at else coalesce(r.enqueued_at, r.was_enqueued_at) end
                as enqueued_at,
            coalesce(r.began_at, r.had_begun_at) as began_at, r.ended_at, r.outcome, r.error, r.waits_for, r.until, r.shard, r.process
        from head h, recorded r
        where r.outcome <> 'detached' or (r.has_ended_at >= coalesce(r.began_at, r.enqueued_at)) is not true
    ), lines as (
        select 0 as place, null::int as seq, 0 as part, null::text as step, null::int as attempt, h.started_at as enqueued_at,
            h.started_at as began_at, h.started_at as ended_at, 'started' as outcome, null::text as error, null::text as waits_for,
            null::timestamptz as until, null::int as shard, null::text as process
        from head h
        union all
        select 1, k.* from known k
        union all
        select 2, s.seq, 0, s.step, s.attempt, s.enqueued_at, s.began_at, null, s.outcome, s.error, s.waits_for, s.until, s.shard, null
        from head h, durable.timeline_standing(i_id) s
        where h.finished_at is null and not exists (select from known k where k.seq = s.seq and k.outcome = s.outcome)
        union all
        select 3, null, 0, null, null, h.finished_at, h.finished_at, h.finished_at, h.status, null, null, null, null, null
        from head h where h.finished_at is not null
    )
    select l.seq, l.part, l.step, l.attempt, l.enqueued_at, l.began_at, l.ended_at, l.outcome, l.error, l.waits_for, l.until, l.shard, l.process
    from lines l order by l.place, l.seq, l.part, coalesce(l.ended_at, 'infinity')
$$;

-- durable.timeline_by_digits(digits), durable.timeline_head_by_digits(digits): the same of the workflow whose id begins so; no more than 12 digits are
-- looked at (see search.sql). DC003 where there is none, or are several.
create or replace function durable.id_by_digits(i_digits text) returns uuid
language plpgsql stable
set search_path = pg_catalog, durable, pg_temp
as $$
declare
    v_digits text := durable.first_digits(i_digits);
    v_ids uuid[] := array(select durable.by_prefix(v_digits));
begin
    if v_ids = '{}' then
        raise exception 'no workflow begins with %…', v_digits using errcode = 'DC003';
    elsif cardinality(v_ids) > 1 then
        raise exception '% workflows begin with %…: %', case cardinality(v_ids) when 2 then '2' else '3 or more' end, v_digits,
            case when length(v_digits) < 12 then 'give more digits of the one that is meant'
                else 'no more digits than these are looked at here, a whole id is what durable.timeline_of takes' end using errcode = 'DC003';
    end if;
    return v_ids[1];
end
$$;

create or replace function durable.timeline_by_digits(i_digits text)
returns table (seq int, part int, step text, attempt int, enqueued_at timestamptz, began_at timestamptz, ended_at timestamptz, outcome text,
    error text, waits_for text, until timestamptz, shard int, process text)
language sql stable security definer
set search_path = pg_catalog, durable, pg_temp
as $$ select t.* from durable.timeline_of(durable.id_by_digits(i_digits)) t $$;

create or replace function durable.timeline_head_by_digits(i_digits text)
returns table (id text, workflow text, version int, status text, started_at timestamptz, finished_at timestamptz, has_history boolean, lag_s float8,
    skips int)
language sql stable security definer
set search_path = pg_catalog, durable, pg_temp
as $$ select h.* from durable.timeline_head(durable.id_by_digits(i_digits)) h $$;
