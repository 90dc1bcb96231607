-- What monitors ask now and then, and what must be answered at once whatever the backlog: reads a bounded part of each table.

-- durable.unread(shard): step events of a shard's log that are not done, and the age of the oldest: of open windows from their cursors
-- on, and of what no tick covers yet. Of each of these it reads 1,000 entries at the most; what is behind them counts by the numbers
-- of the events, with as many step events each as those have (an entry for timelines: none).
create or replace function durable.unread(i_shard int, out events bigint, out age_s float8)
language plpgsql stable security definer
set search_path = pg_catalog, durable, pg_temp
set enable_seqscan = off set enable_bitmapscan = off  -- nobody analyzes a log: these would read the whole backlog, and sort it
as $$
declare
    v_entries_max constant int := 1000;
    v_shard durable.shard := (select s from durable.shard s where s.shard = i_shard);
    v_part record;
    v_begin durable.cursor;
    v_late xid8[];
    v_queries text[];
    v_found record;
begin
    events := 0;
    age_s := 0;
    for v_part in
        select w.s0, w.s1, w.done, (select b.seq_end from pgque.get_batch_info(w.batch) b) as newest from durable.win w where w.shard = i_shard
        union all
        select t.tick_snapshot, pg_current_snapshot(), row('0'::xid8, 0, 0)::durable.cursor, q.ev_new + t.tick_event_seq
        from (select * from pgque.tick t where t.tick_queue = v_shard.queue_id order by t.tick_id desc limit 1) t,
            pgque.get_queue_info(v_shard.queue) q
    loop
        v_begin := durable.range_begin(v_part.done, v_part.s0);
        v_late := array(select x from pg_snapshot_xip(v_part.s0) x where pg_visible_in_snapshot(x, v_part.s1));
        -- As durable.window_query, which hands out whole bodies.
        v_queries := array(
            select format('(select ev_id, ev_time, ev_extra1, ev_type = %L as is_history from %s where %s order by ev_txid, ev_id limit %s)',
                'history', t.name, c.condition, v_entries_max)
            from unnest(pgque.event_tables(v_shard.queue_id, v_part.s0)) t(name),
                (values ('(ev_txid, ev_id) >= ($1, $2) and ev_txid < $5 and pg_visible_in_snapshot(ev_txid, $6)', true),
                        ('(ev_txid, ev_id) >= ($3, $4) and ev_txid = any ($7)', v_late <> '{}')) c(condition, is_needed)
            where c.is_needed);
        execute 'select count(*) as entries, max(ev_id) as newest, min(ev_time) filter (where is_history is not true) as oldest,'
                ' sum(case when is_history then 0 when ev_extra1 ~ ''^[0-9]{1,6}$'' then ev_extra1::int else 1 end) as lines from ('
                || array_to_string(v_queries, ' union all ') || ') e'
            into v_found
            using v_begin.txid, v_begin.id, (v_part.done).txid, (v_part.done).id, pg_snapshot_xmax(v_part.s1), v_part.s1, v_late;
        continue when v_found.entries = 0;
        events := events + greatest(v_found.lines - (v_part.done).line, 0);
        if v_found.entries >= v_entries_max then
            events := events + greatest(coalesce(v_part.newest, 0) - v_found.newest, 0) * v_found.lines / v_found.entries;
        end if;
        age_s := greatest(age_s, extract(epoch from clock_timestamp() - v_found.oldest));  -- of no step event: null, which counts for nothing
    end loop;
end
$$;

-- durable.shard_figures(): a row a shard: what is unread (see durable.unread), how many consumers are connected, how old the newest
-- rotation is (0 while the log is empty), how large the log is.
create or replace function durable.shard_figures()
returns table (shard int, lag_events bigint, lag_s float8, consumers int, rotation_age_s float8, log_bytes bigint)
language sql stable security definer
set search_path = pg_catalog, durable, pg_temp
as $$
    select s.shard, u.events, u.age_s, coalesce(c.consumers, 0)::int,
        case when l.rows_bytes > 0 then extract(epoch from clock_timestamp() - q.queue_switch_time)::float8 else 0 end, l.bytes
    from durable.shard s
    join pgque.queue q on q.queue_id = s.queue_id
    cross join lateral durable.unread(s.shard) u
    cross join lateral (
        select sum(pg_relation_size(t.name))::bigint as rows_bytes, sum(pg_total_relation_size(t.name))::bigint as bytes
        from (select (q.queue_data_pfx || '_' || n)::regclass as name from generate_series(0, q.queue_ntables - 1) n) t) l
    left join (
        select split_part(a.application_name, ' ', 3) as shard, count(*) as consumers from pg_stat_activity a
        where a.datname = current_database() and a.application_name like 'durable-cluster shard %' group by 1) c on c.shard = s.shard::text
    order by s.shard
$$;

-- durable.estimated(table, conditions): how many rows meet each condition. Exact up to 1,000 pages; of a larger table so many are read,
-- and the count is an estimate. Not for callers of other roles: the conditions are SQL, and it runs with the caller's rights.
create or replace function durable.estimated(i_table regclass, variadic i_conditions text[]) returns bigint[]
language plpgsql volatile
set search_path = pg_catalog, durable, pg_temp
as $$
declare
    v_pages_max constant int := 1000;
    v_share float8 := least(1, v_pages_max / greatest(1, pg_relation_size(i_table) / current_setting('block_size')::float8));
    v_counts float8[];
begin
    execute format('select array[%s] from %s %s',
            (select string_agg(format('count(*) filter (where %s)', c), ',') from unnest(i_conditions) c), i_table,
            case when v_share < 1 then format('tablesample system (%s)', 100 * v_share) else '' end)
        into v_counts;
    return array(select (n / v_share)::bigint from unnest(v_counts) with ordinality c(n, o) order by o);
end
$$;

-- durable.figures(): what is not in the log and how late it is; the server's WAL so far, in bytes; how far the history is behind (null: there
-- is none). Timers are counted up to 10,001.
create or replace function durable.figures(out timers_due bigint, out timer_lag_s float8, out schedule_lag_s float8, out sleeping bigint, out waits bigint,
    out joins bigint, out detached_waiting bigint, out queued bigint, out parked bigint, out stuck bigint, out wal_bytes numeric, out history_lag_s float8)
language plpgsql volatile security definer
set search_path = pg_catalog, durable, pg_temp
as $$
declare
    v_waits bigint[] := durable.estimated('durable.wait', 'names is null', 'names <> ''{}''', 'names = ''{}''');
begin
    select coalesce(o.timers_s, 0), coalesce(o.schedules_s, 0) into timer_lag_s, schedule_lag_s from durable.overdue() o;
    timers_due := case when timer_lag_s > 0 then durable.timers_due(10001) else 0 end;
    sleeping := v_waits[1];
    waits := v_waits[2];
    joins := v_waits[3];
    detached_waiting := (durable.estimated('durable.detached', 'owner = 0'))[1];
    queued := (durable.estimated('durable.queued', 'true'))[1];
    parked := (durable.estimated('durable.parked', 'true'))[1];
    stuck := (durable.estimated('durable.dead_letter', 'true'))[1];
    wal_bytes := case when pg_is_in_recovery() then null else pg_current_wal_insert_lsn() - '0/0'::pg_lsn end;
    history_lag_s := durable.history_lag();
end
$$;

-- durable.timers_due(max): how many timers are due and no sweep has fired, counted up to i_max.
create or replace function durable.timers_due(i_max int) returns bigint
language plpgsql stable security definer
set search_path = pg_catalog, durable, pg_temp set plan_cache_mode = force_generic_plan
set enable_seqscan = off set enable_bitmapscan = off
as $$
declare
    v_control durable.timer_control;
    v_now timestamptz := durable.timer_now();
begin
    select c.* into v_control from durable.timer_control c where c.one;
    return (select count(*) from (
        select from durable.timer t where (t.due, t.id) > (v_control.reached_due, v_control.reached_id) and t.due <= v_now limit i_max) q);
end
$$;
