-- Rotation: three tables a queue, emptied by truncate; and the trimming of control rows.

-- pgque.low_tick(queue_id) -> bigint; internal
-- Result: the lowest tick that any subscription, or any open batch, still starts from; the newest without subscriptions.
-- Tables: as subscription_state, tick (read).
create or replace function pgque.low_tick(queue_id int) returns bigint
language sql volatile set search_path = pg_catalog, pgque, pg_temp
as $$
  select coalesce((select min(least(t.reached_tick, t.prev_tick)) from pgque.subscription_state t where t.sub_queue = $1),
                  (select max(t.tick_id) from pgque.tick t where t.tick_queue = $1))
$$;

-- pgque.truncate_now(event_table) -> boolean; internal
-- Result: false when somebody holds a lock on the table. Tables: truncates event_table.
-- Hazard: waiting for the lock would queue every reader and writer behind a long reader; so it is tried, not awaited.
create or replace function pgque.truncate_now(event_table text) returns boolean
language plpgsql set search_path = pg_catalog, pgque, pg_temp
as $$
begin
  execute 'lock table ' || event_table || ' in access exclusive mode nowait';
  execute 'truncate ' || event_table;
  return true;
exception when lock_not_available then
  return false;
end $$;

-- pgque.maint_rotate_tables_step1(queue) -> int
-- Switches to the next table, emptied. Result: 1 rotated; 0 not due (period), not possible (step 2 is missing, unread events,
-- a lock held). Tables: queue (row lock, update), tick, as subscription_state (read), truncates the next event table.
-- Hazards: what is truncated was left two switches ago. Its last writers have ids below the switch_step2 of the switch
-- after it, and that switch was allowed only when all windows began past it; the same is asked here for the last switch,
-- for the next time. The counter in the sequence moves before the commit, so a producer with an older snapshot is stopped;
-- set, not incremented, and mended here, for a rotation that is rolled back must not stop such producers for ever.
create or replace function pgque.maint_rotate_tables_step1(queue text) returns int
language plpgsql security definer set search_path = pg_catalog, pgque, pg_temp
as $$
declare
  v_id int := pgque.queue_id(queue);
  v_queue pgque.queue;
  v_next int;
begin
  if current_setting('transaction_isolation') in ('repeatable read', 'serializable') then
    perform pgque.refuse_isolation('maint_rotate_tables_step1');
  end if;
  select q.* into v_queue from pgque.queue q where q.queue_id = v_id for no key update;
  if v_queue.queue_rotations is distinct from pg_sequence_last_value(v_queue.queue_rotation_seq::regclass) then
    perform setval(v_queue.queue_rotation_seq::regclass, v_queue.queue_rotations);
  end if;
  if v_queue.queue_switch_step2 is null
     or clock_timestamp() between v_queue.queue_switch_time and v_queue.queue_switch_time + v_queue.queue_rotation_period
     or exists (select from pgque.tick t where t.tick_queue = v_id and t.tick_id = pgque.low_tick(v_id)
                  and pg_snapshot_xmin(t.tick_snapshot) <= v_queue.queue_switch_step2) then
    return 0;
  end if;
  v_next := (v_queue.queue_cur_table + 1) % v_queue.queue_ntables;
  if not pgque.truncate_now(v_queue.queue_data_pfx || '_' || v_next) then
    return 0;
  end if;
  perform setval(v_queue.queue_rotation_seq::regclass, v_queue.queue_rotations + 1);
  update pgque.queue q
     set queue_cur_table = v_next, queue_switch_time = clock_timestamp(), queue_rotations = v_queue.queue_rotations + 1,
         queue_switch_step1 = pg_current_xact_id(), queue_switch_step2 = null
   where q.queue_id = v_id;
  return 1;
end $$;

-- pgque.maint_rotate_tables_step2() -> int
-- Notes a transaction id that is higher than that of every writer into the tables before the last switch.
-- Result: how many queues. Tables: queue (update).
-- Hazard: the id must be assigned after step 1 has committed, or such a writer could have a higher one; so it is refused in
-- a transaction that has one already.
create or replace function pgque.maint_rotate_tables_step2() returns int
language plpgsql security definer set search_path = pg_catalog, pgque, pg_temp
as $$
declare
  v_done int;
begin
  if not exists (select from pgque.queue q where q.queue_switch_step2 is null) then
    return 0;
  end if;
  if pg_current_xact_id_if_assigned() is not null then
    raise exception 'step 2 of a rotation needs a transaction of its own' using errcode = 'active_sql_transaction',
      hint = 'commit first';
  end if;
  update pgque.queue q set queue_switch_step2 = pg_current_xact_id() where q.queue_switch_step2 is null;
  get diagnostics v_done = row_count;
  return v_done;
end $$;

-- pgque.trim_batches(queue_id) -> bigint; internal
-- Deletes ended batches. Result: rows deleted from batch. Tables: batch, batch_end (delete).
-- Kept: open batches; the furthest window of each group, which is its position; the newest batch of each holder, so that the
-- look-up of its open batch meets a live row and not the dead ones behind it.
-- Hazard: a takeover between the look at the group and the deletion opens an old window anew; asking for the end spares it.
create or replace function pgque.trim_batches(queue_id int) returns bigint
language plpgsql set search_path = pg_catalog, pgque, pg_temp
as $$
declare
  v_group record;
  v_deleted bigint;
  v_total bigint := 0;
begin
  for v_group in
    select t.sub_id, max(t.reached_tick) as reached_tick, array_agg(t.newest_batch) filter (where t.newest_batch is not null) as newest
      from pgque.subscription_state t where t.sub_queue = queue_id group by t.sub_id order by t.sub_id
  loop
    with gone as (
      delete from pgque.batch b
       where b.batch_sub = v_group.sub_id and b.batch_next_tick < v_group.reached_tick
         and b.batch_id <> all(coalesce(v_group.newest, '{}'))
         and exists (select from pgque.batch_end e where e.batch_id = b.batch_id)
      returning b.batch_id),
    ends as (
      delete from pgque.batch_end e using gone where e.batch_id = gone.batch_id)
    select count(*) into v_deleted from gone;
    v_total := v_total + v_deleted;
  end loop;
  return v_total;
end $$;

-- pgque.trim_ticks(queue_id) -> bigint; internal
-- Deletes the ticks nothing starts from any more, at most 100,000 a call. Result: rows deleted. Tables: tick (delete).
-- Hazard: a registration in flight has chosen the newest tick and is not yet visible; while one is, nothing is trimmed.
create or replace function pgque.trim_ticks(queue_id int) returns bigint
language plpgsql set search_path = pg_catalog, pgque, pg_temp
as $$
declare
  v_low bigint;
  v_deleted bigint;
begin
  lock table pgque.subscription in share row exclusive mode nowait;
  v_low := pgque.low_tick(queue_id);
  delete from pgque.tick t
   where t.tick_queue = queue_id and t.tick_id = any(array(
     select o.tick_id from pgque.tick o where o.tick_queue = queue_id and o.tick_id < v_low order by o.tick_id limit 100000));
  get diagnostics v_deleted = row_count;
  return v_deleted;
exception when lock_not_available then
  return 0;
end $$;

-- pgque.maint() -> int
-- One round of upkeep: rotation step 1 of every queue that is due and has anything to empty, then trimming. Step 2 is apart.
-- Result: rotations plus queues trimmed. Tables: as step 1, trim_batches, trim_ticks.
-- Hazard: an idle system must stay quiet: empty tables are not rotated, and nothing to trim costs no transaction id.
create or replace function pgque.maint() returns int
language plpgsql security definer set search_path = pg_catalog, pgque, pg_temp
as $$
declare
  v_queue record;
  v_done int := 0;
begin
  for v_queue in
    select q.queue_id, q.queue_name,
           q.queue_switch_step2 is not null
           and clock_timestamp() not between q.queue_switch_time and q.queue_switch_time + q.queue_rotation_period
           and exists (select from generate_series(0, q.queue_ntables - 1) n
                        where pg_relation_size((q.queue_data_pfx || '_' || n)::regclass) > 0)
           or q.queue_rotations is distinct from pg_sequence_last_value(q.queue_rotation_seq::regclass) as is_due
      from pgque.queue q order by q.queue_id
  loop
    if v_queue.is_due then
      v_done := v_done + pgque.maint_rotate_tables_step1(v_queue.queue_name);
    end if;
  end loop;
  for v_queue in select q.queue_id from pgque.queue q order by q.queue_id loop
    if pgque.trim_batches(v_queue.queue_id) + pgque.trim_ticks(v_queue.queue_id) > 0 then
      v_done := v_done + 1;
    end if;
  end loop;
  return v_done;
end $$;
