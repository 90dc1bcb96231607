-- Ticks: numbered snapshots that cut the stream of events into batches.

-- pgque.snap() -> pg_snapshot
-- Result: the current snapshot, in which the own transaction counts as running.
-- Hazard: Postgres leaves the own id out of the list of the running, so it reads as visible; what this transaction appends
-- after the snapshot was taken would belong to a window that has already been read, and be lost.
-- Volatile, so that it sees what committed before this very statement. Invoker and without a search path of its own: it
-- touches no object, every name is qualified, and it stands on the path of every tick.
create or replace function pgque.snap() returns pg_snapshot
language plpgsql volatile
as $$
declare
  v_snap pg_catalog.pg_snapshot := pg_catalog.pg_current_snapshot();
  v_own pg_catalog.xid8 := pg_catalog.pg_current_xact_id_if_assigned();
begin
  if v_own is null or v_own operator(pg_catalog.>=) pg_catalog.pg_snapshot_xmax(v_snap) then
    return v_snap;
  end if;
  return (select pg_catalog.concat(least(pg_catalog.pg_snapshot_xmin(v_snap), v_own), ':', pg_catalog.pg_snapshot_xmax(v_snap), ':',
                                   pg_catalog.string_agg(r.x::pg_catalog.text, ',' order by r.x))::pg_catalog.pg_snapshot
            from (select x from pg_catalog.pg_snapshot_xip(v_snap) x union select v_own) r(x));
end $$;

-- pgque.ticker(queue, tick_id, tick_timestamp, event_seq) -> bigint
-- The tick of an external source. Parameters: tick_id must grow, event_seq must not shrink. Result: tick_id.
-- Tables: queue (row lock), tick (read newest, insert).
-- Hazard: two tickers at once would store their snapshots in the wrong order, and events be delivered twice. The queue's
-- row is locked first; the snapshot is taken in a later statement, so it sees what the ticker before it committed.
create or replace function pgque.ticker(queue text, tick_id bigint, tick_timestamp timestamptz, event_seq bigint) returns bigint
language plpgsql security definer set search_path = pg_catalog, pgque, pg_temp set enable_seqscan = off
as $$
declare
  v_queue record;
  v_last record;
begin
  if current_setting('transaction_isolation') in ('repeatable read', 'serializable') then
    perform pgque.refuse_isolation('ticker');
  end if;
  select q.queue_id, q.queue_external_ticker, q.queue_ticker_paused
    into v_queue from pgque.queue q where q.queue_name = queue for no key update;
  if not found then
    raise exception 'queue not found: %', queue using errcode = 'undefined_object';
  end if;
  if not v_queue.queue_external_ticker or v_queue.queue_ticker_paused then
    raise exception 'queue % takes no external ticks: it has its own ticker or is paused', queue
      using errcode = 'object_not_in_prerequisite_state', hint = 'set_queue_config(queue, ''external_ticker'', ''true'')';
  end if;
  select t.tick_id, t.tick_event_seq into v_last
    from pgque.tick t where t.tick_queue = v_queue.queue_id order by t.tick_id desc limit 1;
  if tick_id is null or event_seq is null or tick_timestamp is null
     or tick_id <= v_last.tick_id or event_seq < v_last.tick_event_seq then
    raise exception 'ticks of queue % must be monotonic: tick %, event % after tick %, event %',
      queue, tick_id, event_seq, v_last.tick_id, v_last.tick_event_seq using errcode = 'invalid_parameter_value';
  end if;
  insert into pgque.tick (tick_queue, tick_id, tick_time, tick_snapshot, tick_event_seq)
  values (v_queue.queue_id, ticker.tick_id, tick_timestamp, pgque.snap(), event_seq);
  return tick_id;
end $$;

-- pgque.has_unread_events(queue_id, s0) -> boolean; internal
-- Result: whether anything that s0 does not see is committed. Tables: the event tables that can hold it (read).
create or replace function pgque.has_unread_events(queue_id int, s0 pg_snapshot) returns boolean
language plpgsql set search_path = pg_catalog, pgque, pg_temp
as $$
declare
  v_table text;
  v_found boolean := false;
begin
  foreach v_table in array pgque.event_tables(queue_id, s0) loop
    execute format('select exists (select from %1$s e where e.ev_txid >= pg_snapshot_xmax($1))
                        or exists (select from %1$s e where e.ev_txid = any(array(select pg_snapshot_xip($1))))', v_table)
       into v_found using s0;
    exit when v_found;
  end loop;
  return v_found;
end $$;

-- pgque.tick_is_due(queue_id) -> boolean; internal
-- Due when max_count events are new, when any are new and max_lag has passed, when idle_period has passed.
-- Tables: queue, tick, and once max_lag has passed the event tables (read).
-- Hazards: a clock stepped back must not stop ticks: time that has run backwards counts as having passed. And an event that
-- was numbered before the last tick but committed after it is not new by its number: it is looked for, or it would wait for
-- the idle period.
create or replace function pgque.tick_is_due(queue_id int) returns boolean
language plpgsql set search_path = pg_catalog, pgque, pg_temp
as $$
declare
  v_queue pgque.queue;
  v_last pgque.tick;
  v_elapsed interval;
  v_new_events bigint;
begin
  select q.* into v_queue from pgque.queue q where q.queue_id = tick_is_due.queue_id;
  select t.* into v_last from pgque.tick t where t.tick_queue = tick_is_due.queue_id order by t.tick_id desc limit 1;
  v_elapsed := clock_timestamp() - v_last.tick_time;
  v_new_events := coalesce(pg_sequence_last_value(v_queue.queue_event_seq::regclass), 0) - v_last.tick_event_seq;
  if v_new_events >= v_queue.queue_ticker_max_count or v_elapsed >= v_queue.queue_ticker_idle_period or v_elapsed < interval '0' then
    return true;
  end if;
  return v_elapsed >= v_queue.queue_ticker_max_lag
         and (v_new_events > 0 or pgque.has_unread_events(v_queue.queue_id, v_last.tick_snapshot));
end $$;

-- pgque.ticker(queue) -> bigint
-- Result: the id of the tick it made, null where none is due. Raises for a paused queue and one with an external ticker.
-- Tables: queue (row lock), tick (read newest, insert).
-- Hazards: as of the external tick, and asked twice: without the lock, so that nothing due costs no transaction id; and
-- under it, so that two tickers make one tick.
create or replace function pgque.ticker(queue text) returns bigint
language plpgsql security definer set search_path = pg_catalog, pgque, pg_temp
as $$
declare
  v_id int := pgque.queue_id(queue);
  v_queue record;
  v_tick bigint;
begin
  if current_setting('transaction_isolation') in ('repeatable read', 'serializable') then
    perform pgque.refuse_isolation('ticker');
  end if;
  select q.queue_external_ticker, q.queue_ticker_paused, q.queue_event_seq into v_queue from pgque.queue q where q.queue_id = v_id;
  if v_queue.queue_external_ticker or v_queue.queue_ticker_paused then
    raise exception 'queue % has %', queue, case when v_queue.queue_external_ticker then 'an external ticker' else 'its ticker paused' end
      using errcode = 'object_not_in_prerequisite_state';
  end if;
  if not pgque.tick_is_due(v_id) then
    return null;
  end if;
  perform from pgque.queue q where q.queue_id = v_id for no key update;
  if not pgque.tick_is_due(v_id) then
    return null;
  end if;
  insert into pgque.tick (tick_queue, tick_id, tick_time, tick_snapshot, tick_event_seq)
  select v_id, t.tick_id + 1, clock_timestamp(), pgque.snap(),
         greatest(t.tick_event_seq, pg_sequence_last_value(v_queue.queue_event_seq::regclass))
    from pgque.tick t where t.tick_queue = v_id order by t.tick_id desc limit 1
  returning tick_id into v_tick;
  return v_tick;
end $$;

-- pgque.ticker() -> bigint
-- Ticks every queue that is neither paused nor external. Result: how many were ticked. Tables: as ticker(queue).
-- Hazard: several queue rows are locked in one transaction; always in the order of their ids.
create or replace function pgque.ticker() returns bigint
language plpgsql security definer set search_path = pg_catalog, pgque, pg_temp
as $$
declare
  v_queue text;
  v_ticked bigint := 0;
begin
  for v_queue in
    select q.queue_name from pgque.queue q
     where not q.queue_external_ticker and not q.queue_ticker_paused order by q.queue_id
  loop
    if pgque.ticker(v_queue) is not null then
      v_ticked := v_ticked + 1;
    end if;
  end loop;
  return v_ticked;
end $$;
