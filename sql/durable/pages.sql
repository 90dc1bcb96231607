-- durable.lost(batch): raises DC001, the answer to whoever works on a window that is not theirs.
create or replace function durable.lost(i_batch bigint) returns void
language plpgsql
as $$
begin
    raise exception 'batch % is lost: another consumer owns it, or it is done', i_batch using errcode = 'DC001';
end
$$;

-- durable.range_begin(done, s0): where the range of a window's events is entered: the later of its cursor and xmax(s0).
-- Hazard: with both as conditions of the query the index would be entered at the cursor, which is zero in a new window, and each
-- first page would walk all that the table has held since it was last emptied.
create or replace function durable.range_begin(i_done durable.cursor, i_s0 pg_snapshot) returns durable.cursor
language sql immutable
as $$ select greatest(i_done, row(pg_snapshot_xmax(i_s0), 0, 0)::durable.cursor) $$;

-- durable.window_query(tables, with_late, limit, type): the events of a window from its cursor on, in the order (ev_txid, ev_id).
-- i_type: which events, those of steps or of history (see timeline.sql).
--
-- The simple query would be "everything visible in s1 and not visible in s0 from xmin(s0) on". One old write transaction pins
-- xmin(s0), and every page would read history again. So: what started after s0 is at or above its xmax, one range of the index;
-- what was in progress at s0 and has ended since is a short list of ids, all below that xmax (i_with_late: there are any). Only
-- tables that can still hold unread events are named, because a plan that names the third starves the rotation's lock.
-- Planning is most of a small page's cost, so the common case, one table and nobody late, is one plain range.
-- i_limit: rows at the most, null for all. Parameters of the query: $1, $2 where the range begins (durable.range_begin: txid, id),
-- $3, $4 the cursor (txid, id), $5 xmax(s1), $6 s1, $7 the late ids.
create or replace function durable.window_query(i_tables text[], i_with_late boolean, i_limit int, i_type text default 'steps') returns text
language plpgsql immutable
set search_path = pg_catalog, durable, pg_temp
as $$
declare
    v_order text := ' order by ev_txid, ev_id limit ' || coalesce(i_limit::text, 'all');
    v_from text := 'select ev_txid as txid, ev_id as id, ev_extra1 as n, coalesce(ev_data, '''') as body from ';
    -- Whatever somebody has appended by hand is taken for steps.
    v_type text := ' and ev_type is ' || case i_type when 'steps' then '' else 'not ' end || 'distinct from ''history''';
    v_range text := ' where (ev_txid, ev_id) >= ($1, $2) and ev_txid < $5 and pg_visible_in_snapshot(ev_txid, $6)' || v_type;
    v_late text := ' where (ev_txid, ev_id) >= ($3, $4) and ev_txid = any ($7)' || v_type;
    v_parts text[];
    v_table text;
begin
    if cardinality(i_tables) = 1 and not i_with_late then
        return v_from || i_tables[1] || v_range || v_order;
    end if;
    foreach v_table in array i_tables loop
        v_parts := v_parts || ('(' || v_from || v_table || v_range || v_order || ')');
        if i_with_late then
            v_parts := v_parts || ('(' || v_from || v_table || v_late || v_order || ')');
        end if;
    end loop;
    return array_to_string(v_parts, ' union all ') || ' order by txid, id limit ' || coalesce(i_limit::text, 'all');
end
$$;

-- durable.page(batch, owner, lines, bytes): the next page of a window, without a lock; null while its shard is paused.
-- Result: one text. Its first line is JSON: the cursor, the events as [txid, id], whether the window ends here, why which of their
-- workflows are cancelled, what is paused, their weights; then the events, a form feed between them (JSON holds none). The cursor's event comes whole; the reader skips the lines that are done.
-- At least one event, then as many as fit: an event is one commit's lines and never larger than a page. How many lines an event
-- says it has counts for that only: somebody may have appended by hand.
create or replace function durable.page(i_batch bigint, i_owner bigint, i_lines int, i_bytes int) returns text
language plpgsql security definer
set search_path = pg_catalog, durable, pg_temp
as $$
declare
    v_win durable.win;
    v_event record;
    v_lines int;
    v_bytes int;
    v_late xid8[];
    v_begin durable.cursor;
    v_queue_id int;
    v_is_last boolean := true;
    v_events text[] := '{}';
    v_bodies text[] := '{}';
begin
    select * into v_win from durable.win w where w.batch = i_batch and w.owner = i_owner;
    if not found then
        perform durable.lost(i_batch);
    end if;
    select s.queue_id into v_queue_id from durable.shard s where s.shard = v_win.shard and not s.is_paused;
    if not found then
        return null;
    end if;
    v_late := array(select x from pg_snapshot_xip(v_win.s0) x where pg_visible_in_snapshot(x, v_win.s1));
    v_begin := durable.range_begin(v_win.done, v_win.s0);
    v_lines := - (v_win.done).line;
    v_bytes := 0;
    for v_event in execute durable.window_query(
            pgque.event_tables(v_queue_id, v_win.s0),
            v_late <> '{}', i_lines + 1)
        using v_begin.txid, v_begin.id, (v_win.done).txid, (v_win.done).id, pg_snapshot_xmax(v_win.s1), v_win.s1, v_late
    loop
        v_lines := v_lines + case when v_event.n ~ '^[0-9]{1,6}$' then v_event.n::int else 1 end;
        v_bytes := v_bytes + octet_length(v_event.body);
        if cardinality(v_events) > 0 and (v_lines > i_lines or v_bytes > i_bytes) then
            v_is_last := false;
            exit;
        end if;
        v_events := v_events || format('["%s",%s]', v_event.txid, v_event.id);
        v_bodies := v_bodies || v_event.body;
    end loop;
    return format('{"batch":%s,"takeovers":%s,"suspects":%s,"done":["%s",%s,%s],"last":%s,"events":[%s]%s}',
            v_win.batch, v_win.takeovers, v_win.suspects, (v_win.done).txid, (v_win.done).id, (v_win.done).line, v_is_last::text,
            array_to_string(v_events, ','),
            case when exists (select from durable.cancelled) or exists (select from durable.pause) or exists (select from durable.priority)
                then durable.cancelled_in(v_bodies) || durable.paused_in(v_bodies) || durable.weights_in(v_win.shard, v_bodies, v_is_last)
                else '' end)
        || case when v_bodies = '{}' then '' else E'\n' || array_to_string(v_bodies, E'\f') end;
end
$$;
