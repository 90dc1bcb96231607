-- Batches: a window between two ticks, handed to one holder, read, finished, or taken over.

-- pgque.tick_after(queue_id, from_tick, min_lag, min_count, min_interval) -> setof bigint; internal, inlined by the planner
-- Result: the first tick after from_tick that is old enough (min_lag) and makes a window of min_count events or min_interval.
-- Without conditions: the next tick. Tables: tick (read, from the oldest tick that is still kept).
create or replace function pgque.tick_after(queue_id int, from_tick bigint, min_lag interval, min_count int, min_interval interval)
returns setof bigint language sql stable
as $$
  select t.tick_id from pgque.tick t
   where t.tick_queue = $1 and t.tick_id > $2
     and ($3 is null or pg_catalog.now() - t.tick_time >= $3)
     and ($4 is null and $5 is null
          or t.tick_event_seq - (select f.tick_event_seq from pgque.tick f where f.tick_queue = $1 and f.tick_id = $2) >= $4
          or t.tick_time - (select f.tick_time from pgque.tick f where f.tick_queue = $1 and f.tick_id = $2) >= $5)
   order by t.tick_id limit 1
$$;

-- pgque.silent_batches(sub_id, member, dead_interval) -> setof bigint; internal, inlined by the planner
-- Result: the open batches of the siblings that have been silent for dead_interval. Tables: as subscription_state.
-- Hazard: a clock stepped back makes an activity lie in the future; farther than dead_interval it counts as silence.
create or replace function pgque.silent_batches(sub_id int, member int, dead_interval interval)
returns setof bigint language sql stable
as $$
  select t.batch_id from pgque.subscription_state t
   where t.sub_id = $1 and t.sub_consumer <> $2 and t.sub_role = 'coop_member' and t.batch_id is not null
     and t.last_active not between pg_catalog.clock_timestamp() - $3 and pg_catalog.clock_timestamp() + $3
$$;

-- pgque.take_over(sub_id, member, dead_interval) -> pgque.batch; internal
-- Ends a silent sibling's batch and opens the same window under a fresh id. Result: the new row, null when there is none.
-- Tables: batch (row lock, insert), batch_end (insert). The caller holds the main row.
-- Hazards: a finish in flight holds the batch row: skipped, never waited for, or a process stopped in the middle of a commit
-- would hold up the whole group. A finish committed between the look and the lock has its row in batch_end: skipped.
create or replace function pgque.take_over(sub_id int, member int, dead_interval interval) returns pgque.batch
language plpgsql set search_path = pg_catalog, pgque, pg_temp
as $$
declare
  v_old pgque.batch;
  v_new pgque.batch;
begin
  for v_old in
    select b.* from pgque.batch b
     where b.batch_id = any(array(select s.id from pgque.silent_batches(take_over.sub_id, member, dead_interval) s(id)))
     order by b.batch_id for update skip locked
  loop
    insert into pgque.batch_end (batch_id, end_how) values (v_old.batch_id, 'taken') on conflict (batch_id) do nothing;
    if found then
      insert into pgque.batch (batch_sub, batch_member, batch_prev_tick, batch_next_tick)
      values (v_old.batch_sub, member, v_old.batch_prev_tick, v_old.batch_next_tick) returning * into v_new;
      return v_new;
    end if;
  end loop;
  return null;
end $$;

-- pgque.open_batch(queue_id, consumer_id, min_lag, min_count, min_interval, dead_interval) -> batch_id, prev_tick_id, next_tick_id; internal
-- The holder's open batch, else a silent sibling's, else the next window; nulls when there is none.
-- Tables: subscription (row lock; a heartbeat when an open batch is asked for again), batch, batch_end, tick.
-- Hazards: the position is read in a statement after the main row's lock, or two members would get one window. An idle poll
-- must write nothing and take no transaction id: so the question is asked without the lock first, unless this transaction
-- has written already. The planner settings: these tables grow from nothing to tens of thousands of rows between two
-- analyses, and a plan made while they were tiny would scan them; compiling a plan takes a thousand times its run.
create or replace function pgque.open_batch(queue_id int, consumer_id int, min_lag interval, min_count int, min_interval interval,
  dead_interval interval, out batch_id bigint, out prev_tick_id bigint, out next_tick_id bigint)
language plpgsql set search_path = pg_catalog, pgque, pg_temp set enable_seqscan = off set jit = off
set plan_cache_mode = force_generic_plan
as $$
declare
  v_sub record;
  v_taken pgque.batch;
begin
  for is_locked in (pg_current_xact_id_if_assigned() is not null)::int .. 1 loop
    if is_locked = 1 then
      perform from pgque.subscription s
        where s.sub_role <> 'coop_member'
          and s.sub_id = (select m.sub_id from pgque.subscription m where m.sub_queue = queue_id and m.sub_consumer = consumer_id)
          for update;
    end if;
    select t.sub_id, t.sub_role, t.reached_tick, t.batch_id, t.prev_tick, t.next_tick, n.tick_id as offered_tick into v_sub
      from pgque.subscription_state t
      left join lateral pgque.tick_after(t.sub_queue, t.reached_tick, min_lag, min_count, min_interval) n(tick_id) on t.batch_id is null
     where t.sub_queue = queue_id and t.sub_consumer = consumer_id;
    if v_sub.batch_id is null and v_sub.offered_tick is null
       and (dead_interval is null or not exists (select from pgque.silent_batches(v_sub.sub_id, consumer_id, dead_interval))) then
      return;
    end if;
  end loop;
  if v_sub.sub_role = 'coop_main' then
    return;  -- converted while we waited for the lock
  end if;
  if v_sub.batch_id is not null then
    if v_sub.sub_role = 'coop_member' then
      update pgque.subscription s set sub_active = clock_timestamp() where s.sub_queue = queue_id and s.sub_consumer = consumer_id;
    end if;
    batch_id := v_sub.batch_id;
    prev_tick_id := v_sub.prev_tick;
    next_tick_id := v_sub.next_tick;
    return;
  end if;
  if dead_interval is not null then
    v_taken := pgque.take_over(v_sub.sub_id, consumer_id, dead_interval);
  end if;
  if v_taken.batch_id is null and v_sub.offered_tick is not null then
    insert into pgque.batch as b (batch_sub, batch_member, batch_prev_tick, batch_next_tick)
    values (v_sub.sub_id, consumer_id, v_sub.reached_tick, v_sub.offered_tick) returning b.* into v_taken;
  end if;
  batch_id := v_taken.batch_id;
  prev_tick_id := v_taken.batch_prev_tick;
  next_tick_id := v_taken.batch_next_tick;
end $$;

-- pgque.next_batch_custom(queue, consumer, subconsumer, min_lag, min_count, min_interval, dead_interval) -> batch_id, prev_tick_id, next_tick_id
-- A batch for one member of a group; consumer and member are registered when missing.
-- Parameters: min_lag the least age of the last tick; min_count or min_interval the least size (either will do; null: one
-- tick); dead_interval lets it take the batch of a sibling silent for so long. Result: nulls when there is nothing.
-- Tables: as open_batch. READ COMMITTED only. The holder's name is looked up, not locked: registering belongs outside the path.
create or replace function pgque.next_batch_custom(queue text, consumer text, subconsumer text, min_lag interval, min_count int,
  min_interval interval, dead_interval interval default null, out batch_id bigint, out prev_tick_id bigint, out next_tick_id bigint)
language plpgsql security definer set search_path = pg_catalog, pgque, pg_temp
as $$
declare
  v_queue int;
  v_member int;
  v_batch record;
begin
  if current_setting('transaction_isolation') in ('repeatable read', 'serializable') then
    perform pgque.refuse_isolation('next_batch');
  end if;
  for attempt in 1 .. 2 loop
    select s.sub_queue, s.sub_consumer into v_queue, v_member
      from pgque.queue q
      join pgque.consumer c on c.co_name = consumer || '.' || subconsumer
      join pgque.subscription s on s.sub_queue = q.queue_id and s.sub_consumer = c.co_id and s.sub_role = 'coop_member'
     where q.queue_name = queue;
    exit when found;
    perform pgque.register_subconsumer(queue, consumer, subconsumer);
  end loop;
  v_batch := pgque.open_batch(v_queue, v_member, min_lag, min_count, min_interval, dead_interval);
  batch_id := v_batch.batch_id;
  prev_tick_id := v_batch.prev_tick_id;
  next_tick_id := v_batch.next_tick_id;
end $$;

-- pgque.next_batch(queue, consumer, subconsumer, dead_interval) -> bigint: the same, one tick, the batch id only.
create or replace function pgque.next_batch(queue text, consumer text, subconsumer text, dead_interval interval default null) returns bigint
language plpgsql security definer set search_path = pg_catalog, pgque, pg_temp
as $$
begin
  return (select b.batch_id from pgque.next_batch_custom(queue, consumer, subconsumer, null, null, null, dead_interval) b);
end $$;

-- pgque.next_batch_custom(queue_name, consumer_name, min_lag, min_count, min_interval)
--   -> batch_id, cur_tick_id, prev_tick_id, cur_tick_time, prev_tick_time, cur_tick_event_seq, prev_tick_event_seq
-- A batch for a normal consumer; the same one again until it is finished. Parameters and tables as above.
-- Hazard: the main row of a group is a cursor, not a consumer; it and its members are refused here.
create or replace function pgque.next_batch_custom(queue_name text, consumer_name text, min_lag interval, min_count int, min_interval interval,
  out batch_id bigint, out cur_tick_id bigint, out prev_tick_id bigint, out cur_tick_time timestamptz, out prev_tick_time timestamptz,
  out cur_tick_event_seq bigint, out prev_tick_event_seq bigint)
language plpgsql security definer set search_path = pg_catalog, pgque, pg_temp
as $$
declare
  v_sub record;
begin
  if current_setting('transaction_isolation') in ('repeatable read', 'serializable') then
    perform pgque.refuse_isolation('next_batch');
  end if;
  select s.sub_queue, s.sub_consumer, s.sub_role into v_sub
    from pgque.subscription s join pgque.consumer c on c.co_id = s.sub_consumer
   where s.sub_queue = pgque.queue_id(next_batch_custom.queue_name) and c.co_name = consumer_name;
  if not found then
    raise exception 'consumer % is not registered on queue %', consumer_name, queue_name using errcode = 'undefined_object';
  end if;
  if v_sub.sub_role <> 'normal' then
    raise exception 'consumer % on queue % is cooperative (%): take batches as a subconsumer', consumer_name, queue_name, v_sub.sub_role
      using errcode = 'object_in_use';
  end if;
  select b.batch_id, b.next_tick_id, b.prev_tick_id, c.tick_time, p.tick_time, c.tick_event_seq, p.tick_event_seq
    into batch_id, cur_tick_id, prev_tick_id, cur_tick_time, prev_tick_time, cur_tick_event_seq, prev_tick_event_seq
    from pgque.open_batch(v_sub.sub_queue, v_sub.sub_consumer, min_lag, min_count, min_interval, null) b
    join pgque.tick c on c.tick_queue = v_sub.sub_queue and c.tick_id = b.next_tick_id
    join pgque.tick p on p.tick_queue = v_sub.sub_queue and p.tick_id = b.prev_tick_id;
end $$;

-- pgque.next_batch_info(queue_name, consumer_name): the same, one tick.
create or replace function pgque.next_batch_info(queue_name text, consumer_name text,
  out batch_id bigint, out cur_tick_id bigint, out prev_tick_id bigint, out cur_tick_time timestamptz, out prev_tick_time timestamptz,
  out cur_tick_event_seq bigint, out prev_tick_event_seq bigint)
language sql volatile security definer set search_path = pg_catalog, pgque, pg_temp
as $$ select * from pgque.next_batch_custom($1, $2, null, null, null) $$;

-- pgque.next_batch(queue_name, consumer_name) -> bigint: the same, one tick, the batch id only.
create or replace function pgque.next_batch(queue_name text, consumer_name text) returns bigint
language plpgsql security definer set search_path = pg_catalog, pgque, pg_temp
as $$
begin
  return (select b.batch_id from pgque.next_batch_custom(queue_name, consumer_name, null, null, null) b);
end $$;

-- pgque.get_batch_events(batch_id) -> ev_id, ev_time, ev_txid, ev_retry, ev_type, ev_data, ev_extra1..4, by ev_id
-- Tables: batch, tick, queue, the event tables that can hold the window (read). Raises for a batch that is not open.
-- A window is what s1 sees and s0 does not. The plain question (not visible in s0, visible in s1, from xmin(s0)) would let
-- one old write transaction make every batch scan all of history. So it is asked as two ranges of the index: ids from
-- xmax(s0) on, and the ids that were in progress in s0.
create or replace function pgque.get_batch_events(batch_id bigint, out ev_id bigint, out ev_time timestamptz, out ev_txid bigint, out ev_retry int,
  out ev_type text, out ev_data text, out ev_extra1 text, out ev_extra2 text, out ev_extra3 text, out ev_extra4 text)
returns setof record
language plpgsql security definer set search_path = pg_catalog, pgque, pg_temp
as $$
declare
  v_window record;
  v_late xid8[];
  v_columns text := 'e.ev_id, e.ev_time, e.ev_txid::text::bigint, e.ev_retry, e.ev_type, e.ev_data, e.ev_extra1, e.ev_extra2, e.ev_extra3, e.ev_extra4';
  v_query text;
begin
  select p.tick_queue, p.tick_snapshot as s0, n.tick_snapshot as s1 into v_window
    from pgque.batch b
    join lateral (select s.sub_queue from pgque.subscription s where s.sub_id = b.batch_sub limit 1) s on true
    join pgque.tick p on p.tick_queue = s.sub_queue and p.tick_id = b.batch_prev_tick
    join pgque.tick n on n.tick_queue = s.sub_queue and n.tick_id = b.batch_next_tick
   where b.batch_id = get_batch_events.batch_id and not exists (select from pgque.batch_end e where e.batch_id = b.batch_id);
  if not found then
    raise exception 'batch not found: %', batch_id using errcode = 'undefined_object';
  end if;
  v_late := array(select x from pg_snapshot_xip(v_window.s0) x where pg_visible_in_snapshot(x, v_window.s1));
  select string_agg(format(
           'select %1$s from %2$s e where e.ev_txid >= pg_snapshot_xmax($1) and e.ev_txid < pg_snapshot_xmax($2) and pg_visible_in_snapshot(e.ev_txid, $2)'
           || case when v_late = '{}' then '' else ' union all select %1$s from %2$s e where e.ev_txid = any($3)' end,
           v_columns, t.name), ' union all ')
    into v_query from unnest(pgque.event_tables(v_window.tick_queue, v_window.s0)) t(name);
  return query execute v_query || ' order by 1' using v_window.s0, v_window.s1, v_late;
end $$;

-- pgque.finish_batch(batch_id) -> int
-- Result: 1 finished; 0, with a warning, when the batch is unknown, finished or taken over. The caller MUST look: after a 0
-- the work belongs to somebody else and has to be rolled back. Tables: batch (row lock), batch_end (insert).
-- Hazard: a finish and a takeover at once. The batch row's lock makes the takeover skip a finish in flight; the primary key
-- of batch_end lets one of them through.
create or replace function pgque.finish_batch(batch_id bigint) returns int
language plpgsql security definer set search_path = pg_catalog, pgque, pg_temp set enable_seqscan = off
as $$
begin
  perform from pgque.batch b where b.batch_id = finish_batch.batch_id for update;
  if found then
    insert into pgque.batch_end (batch_id, end_how) values (finish_batch.batch_id, 'finished') on conflict do nothing;
    if found then
      return 1;
    end if;
  end if;
  raise warning 'batch not found: %', batch_id;
  return 0;
end $$;
