-- Events: appending, and where they lie.

-- pgque.insert_event(queue_name, ev_type, ev_data, ev_extra1..4) -> bigint
-- Result: the event id. Raises "queue not found", "Insert into queue disallowed"; 40001 where the caller's snapshot
-- predates a rotation. Tables: queue (read), the current event table (insert).
-- Hazards: the transaction id is assigned FIRST and the current table resolved in a LATER statement. An assigned id holds
-- the second rotation back (its xmin cannot pass); the other way round a stalled inserter writes into a table that has been
-- rotated twice, and its event is never read. A producer with a fixed snapshot cannot see the newest row, so it compares
-- its row with a counter kept in a sequence, which is read outside MVCC.
create or replace function pgque.insert_event(queue_name text, ev_type text, ev_data text,
  ev_extra1 text, ev_extra2 text, ev_extra3 text, ev_extra4 text) returns bigint
language plpgsql security definer set search_path = pg_catalog, pgque, pg_temp
as $$
declare
  v_queue record;
  v_id bigint;
begin
  perform pg_current_xact_id();
  select q.queue_data_pfx || '_' || q.queue_cur_table as cur_table, q.queue_event_seq, q.queue_disable_insert,
         q.queue_rotations, q.queue_rotation_seq
    into v_queue from pgque.queue q where q.queue_name = insert_event.queue_name;
  if not found then
    raise exception 'queue not found: %', queue_name using errcode = 'undefined_object';
  end if;
  if v_queue.queue_disable_insert then
    raise exception 'Insert into queue disallowed' using errcode = 'object_not_in_prerequisite_state';
  end if;
  if current_setting('transaction_isolation') in ('repeatable read', 'serializable')
     and v_queue.queue_rotations is distinct from pg_sequence_last_value(v_queue.queue_rotation_seq::regclass) then
    raise exception 'queue % was rotated after this transaction began: run the transaction again', queue_name
      using errcode = 'serialization_failure';
  end if;
  v_id := nextval(v_queue.queue_event_seq::regclass);
  execute 'insert into ' || v_queue.cur_table ||
          ' (ev_id, ev_type, ev_data, ev_extra1, ev_extra2, ev_extra3, ev_extra4) values ($1, $2, $3, $4, $5, $6, $7)'
    using v_id, ev_type, ev_data, ev_extra1, ev_extra2, ev_extra3, ev_extra4;
  return v_id;
end $$;

-- pgque.insert_event(queue_name, ev_type, ev_data) -> bigint: as above, without extras.
create or replace function pgque.insert_event(queue_name text, ev_type text, ev_data text) returns bigint
language plpgsql security definer set search_path = pg_catalog, pgque, pg_temp
as $$
begin
  return pgque.insert_event(queue_name, ev_type, ev_data, null, null, null, null);
end $$;

-- pgque.event_tables(queue_id, s0) -> text[]
-- Parameters: s0 the snapshot a window begins at. Result: the qualified tables that can hold its events, the current last.
-- Tables: queue (read).
-- Why the previous table drops out: a writer into it resolved the table before step 1 of the last rotation committed and
-- had its transaction id already; step 2 took its id after that commit, so the writer's id is lower than switch_step2. If
-- xmin(s0) >= switch_step2 then every such writer had ended when s0 was taken, and what it wrote is visible in s0: read.
-- The table before that holds nothing unread either: step 1 refuses while any window reaches back over the last switch.
-- Hazard: a plan that names a table it does not need keeps a lock on it, and rotation (nowait) starves.
create or replace function pgque.event_tables(queue_id int, s0 pg_snapshot) returns text[]
language plpgsql stable security definer set search_path = pg_catalog, pgque, pg_temp
as $$
declare
  v_queue record;
  v_current text;
begin
  select q.queue_data_pfx, q.queue_cur_table, q.queue_ntables, q.queue_switch_step2
    into v_queue from pgque.queue q where q.queue_id = event_tables.queue_id;
  if not found then
    raise exception 'queue not found: %', queue_id using errcode = 'undefined_object';
  end if;
  v_current := v_queue.queue_data_pfx || '_' || v_queue.queue_cur_table;
  if v_queue.queue_switch_step2 is not null and pg_snapshot_xmin(s0) >= v_queue.queue_switch_step2 then
    return array[v_current];
  end if;
  return array[v_queue.queue_data_pfx || '_' || (v_queue.queue_cur_table + v_queue.queue_ntables - 1) % v_queue.queue_ntables,
               v_current];
end $$;
