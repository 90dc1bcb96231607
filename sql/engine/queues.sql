-- Queues: create, drop, configure.

-- pgque.version() -> text
-- Result: the API version this engine follows, and whose engine it is.
create or replace function pgque.version() returns text
language sql immutable set search_path = pg_catalog, pgque, pg_temp
as $$ select '0.2.0-durable' $$;

-- pgque.refuse_isolation(what): raises; called when a function that must see the newest commits runs under an older snapshot.
-- Hazard: a tick taken under REPEATABLE READ stores an older snapshot under a newer number, and events are delivered twice.
create or replace function pgque.refuse_isolation(what text) returns void
language plpgsql set search_path = pg_catalog, pgque, pg_temp
as $$
begin
  raise exception '% must run under READ COMMITTED, not %', what, upper(current_setting('transaction_isolation'))
    using errcode = 'invalid_transaction_state',
          hint = 'begin the transaction with "isolation level read committed"';
end $$;

-- pgque.queue_id(queue) -> int
-- Result: the queue's id; raises "queue not found". Tables: queue (read).
create or replace function pgque.queue_id(queue text) returns int
language plpgsql stable set search_path = pg_catalog, pgque, pg_temp
as $$
declare
  v_id int;
begin
  select q.queue_id into v_id from pgque.queue q where q.queue_name = queue;
  if not found then
    raise exception 'queue not found: %', queue using errcode = 'undefined_object';
  end if;
  return v_id;
end $$;

-- pgque.create_event_tables(queue_id): the parent, its three children and their index; internal.
-- Tables: creates pgque.event_<id>, event_<id>_0..2 and two sequences.
-- Hazard: event text is thousands of JSON lines; pglz costs more than the step itself, so it is lz4 or no compression.
create or replace function pgque.create_event_tables(queue_id int) returns void
language plpgsql set search_path = pg_catalog, pgque, pg_temp
as $$
declare
  v_parent text := 'event_' || queue_id;
  v_has_lz4 boolean := (select 'lz4' = any(s.enumvals) from pg_catalog.pg_settings s where s.name = 'default_toast_compression');
begin
  execute format('create sequence pgque.%I', v_parent || '_id_seq');
  execute format('create sequence pgque.%I minvalue 0', v_parent || '_rot_seq');
  perform setval(format('pgque.%I', v_parent || '_rot_seq')::regclass, 0);
  execute format($sql$
    create table pgque.%I (
      ev_id bigint not null default nextval(%L),
      ev_time timestamptz not null default now(),
      ev_txid xid8 not null default pg_current_xact_id(),
      ev_owner int, ev_retry int, ev_type text, ev_data text,
      ev_extra1 text, ev_extra2 text, ev_extra3 text, ev_extra4 text)$sql$,
    v_parent, format('pgque.%I', v_parent || '_id_seq'));
  if v_has_lz4 then
    execute format('alter table pgque.%I alter ev_data set compression lz4', v_parent);
  else
    execute format('alter table pgque.%I alter ev_data set storage external', v_parent);
  end if;
  for n in 0 .. 2 loop
    execute format('create table pgque.%I () inherits (pgque.%I)', v_parent || '_' || n, v_parent);
    execute format('create index %I on pgque.%I (ev_txid, ev_id)', v_parent || '_' || n || '_txid_idx', v_parent || '_' || n);
  end loop;
  if to_regrole('pgque_reader') is not null and has_schema_privilege('pgque_reader', 'pgque', 'usage') then
    execute format('grant select on pgque.%I, pgque.%I, pgque.%I, pgque.%I to pgque_reader',
                   v_parent, v_parent || '_0', v_parent || '_1', v_parent || '_2');
    execute format('grant all on pgque.%I, pgque.%I, pgque.%I, pgque.%I to pgque_admin',
                   v_parent, v_parent || '_0', v_parent || '_1', v_parent || '_2');
    execute format('grant all on sequence pgque.%I, pgque.%I to pgque_admin', v_parent || '_id_seq', v_parent || '_rot_seq');
  end if;
end $$;

-- pgque.create_queue(queue) -> int
-- Parameters: the name, at most 57 bytes. Result: 1 created, 0 it exists.
-- Tables: queue, tick (insert: the first tick, so that a consumer always has a place to start); creates the event tables.
create or replace function pgque.create_queue(queue text) returns int
language plpgsql security definer set search_path = pg_catalog, pgque, pg_temp
as $$
declare
  v_id int;
begin
  if queue is null or octet_length(queue) not between 1 and 57 then
    raise exception 'queue name must have 1 to 57 bytes: %', queue using errcode = 'invalid_name';
  end if;
  if current_setting('transaction_isolation') in ('repeatable read', 'serializable') then
    perform pgque.refuse_isolation('create_queue');
  end if;
  if exists (select from pgque.queue q where q.queue_name = queue) then
    return 0;
  end if;
  insert into pgque.queue as q (queue_name, queue_data_pfx, queue_event_seq, queue_rotation_seq)
  values (queue, '', '', '')
  on conflict (queue_name) do nothing
  returning q.queue_id into v_id;
  if v_id is null then
    return 0;
  end if;
  perform pgque.create_event_tables(v_id);
  update pgque.queue q
     set queue_data_pfx = 'pgque.event_' || v_id,
         queue_event_seq = 'pgque.event_' || v_id || '_id_seq',
         queue_rotation_seq = 'pgque.event_' || v_id || '_rot_seq'
   where q.queue_id = v_id;
  insert into pgque.tick (tick_queue, tick_id, tick_time, tick_snapshot, tick_event_seq)
  values (v_id, 1, clock_timestamp(), pgque.snap(), 0);
  return 1;
end $$;

-- pgque.drop_queue(queue, force) -> int
-- Parameters: force drops the subscriptions with it, cooperative members included. Result: 1.
-- Tables: queue, tick, subscription, batch, batch_end (delete), consumer (delete of the unused); drops the event tables.
-- Hazard: with consumers attached their unread events would go; refused unless forced.
create or replace function pgque.drop_queue(queue text, force boolean) returns int
language plpgsql security definer set search_path = pg_catalog, pgque, pg_temp
as $$
declare
  v_id int := pgque.queue_id(queue);
  v_consumers int[];
begin
  perform from pgque.queue q where q.queue_id = v_id for update;
  select array_agg(s.sub_consumer) into v_consumers from pgque.subscription s where s.sub_queue = v_id;
  if v_consumers is not null and force is not true then
    raise exception 'cannot drop queue %: % consumers are attached', queue, cardinality(v_consumers)
      using errcode = 'dependent_objects_still_exist', hint = 'unregister them, or drop the queue with force';
  end if;
  with gone as (
    delete from pgque.batch b using pgque.subscription s
     where s.sub_queue = v_id and b.batch_sub = s.sub_id returning b.batch_id)
  delete from pgque.batch_end e using gone where e.batch_id = gone.batch_id;
  delete from pgque.subscription s where s.sub_queue = v_id;
  delete from pgque.consumer c
   where c.co_id = any(v_consumers) and not exists (select from pgque.subscription s where s.sub_consumer = c.co_id);
  delete from pgque.tick t where t.tick_queue = v_id;
  delete from pgque.queue q where q.queue_id = v_id;
  execute format('drop table pgque.%I cascade', 'event_' || v_id);
  execute format('drop sequence pgque.%I, pgque.%I', 'event_' || v_id || '_id_seq', 'event_' || v_id || '_rot_seq');
  return 1;
end $$;

-- pgque.drop_queue(queue) -> int: as above, refused while consumers are attached.
create or replace function pgque.drop_queue(queue text) returns int
language sql security definer set search_path = pg_catalog, pgque, pg_temp
as $$ select pgque.drop_queue($1, false) $$;

-- pgque.set_queue_config(queue, param, value) -> int
-- Parameters: param without its queue_ prefix; value as text, null for the default. Result: 1.
-- Tables: queue (update). Hazard: a period of zero or less would tick or rotate without end; refused.
create or replace function pgque.set_queue_config(queue text, param text, value text) returns int
language plpgsql security definer set search_path = pg_catalog, pgque, pg_temp
as $$
declare
  v_id int := pgque.queue_id(queue);
  v_type text := case
    when param in ('ticker_max_count', 'max_retries') then 'int'
    when param in ('ticker_max_lag', 'ticker_idle_period', 'rotation_period') then 'interval'
    when param in ('ticker_paused', 'external_ticker') then 'boolean' end;
  v_is_valid boolean := true;
begin
  if v_type is null then
    raise exception 'unknown queue parameter: %', param using errcode = 'invalid_parameter_value',
      hint = 'one of ticker_max_count, ticker_max_lag, ticker_idle_period, ticker_paused, rotation_period, external_ticker, max_retries';
  end if;
  if value is null then
    execute format('update pgque.queue set %I = default where queue_id = $1', 'queue_' || param) using v_id;
    return 1;
  end if;
  v_is_valid := case v_type
    when 'int' then value::int >= case param when 'max_retries' then 0 else 1 end
    when 'interval' then value::interval > interval '0'
    else true end;
  if not v_is_valid then
    raise exception 'queue parameter % is out of range: %', param, value using errcode = 'invalid_parameter_value';
  end if;
  execute format('update pgque.queue set %I = $2::%s where queue_id = $1', 'queue_' || param, v_type) using v_id, value;
  return 1;
end $$;
