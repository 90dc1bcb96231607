-- Consumers: subscriptions, cooperative members, and where each of them stands.

-- pgque.subscription_state: one row a subscription (main rows and members).
--   reached_tick   how far the subscription, or the group it belongs to, has been handed out
--   newest_batch   the holder's newest batch, open or ended
--   batch_id, prev_tick, next_tick   the holder's open batch: the newest, when it has no end; else null
--   last_active    the later of the last heartbeat and the opening of the newest batch
-- Both look-ups read an index from its newest end, so they meet a live row first, whatever was trimmed behind it.
create or replace view pgque.subscription_state as
select s.sub_queue, s.sub_consumer, s.sub_id, s.sub_role,
       coalesce(furthest.batch_next_tick, s.sub_start_tick) as reached_tick,
       newest.batch_id as newest_batch,
       case when e.batch_id is null then newest.batch_id end as batch_id,
       case when e.batch_id is null then newest.batch_prev_tick end as prev_tick,
       case when e.batch_id is null then newest.batch_next_tick end as next_tick,
       greatest(s.sub_active, newest.batch_opened) as last_active
  from pgque.subscription s
  left join lateral (select b.batch_next_tick from pgque.batch b
                      where b.batch_sub = s.sub_id order by b.batch_next_tick desc limit 1) furthest on true
  left join lateral (select b.* from pgque.batch b
                      where b.batch_sub = s.sub_id and b.batch_member = s.sub_consumer order by b.batch_id desc limit 1) newest on true
  left join pgque.batch_end e on e.batch_id = newest.batch_id;

-- pgque.consumer_id(name) -> int; internal
-- Result: the consumer's id, made when missing. Tables: consumer (insert, row lock).
-- Hazard: the last unregistration elsewhere deletes the row at the same moment; the share lock keeps it until the
-- subscription that refers to it is committed, and a row gone meanwhile is made again.
create or replace function pgque.consumer_id(name text) returns int
language plpgsql set search_path = pg_catalog, pgque, pg_temp
as $$
declare
  v_id int;
begin
  for attempt in 1 .. 10 loop
    select c.co_id into v_id from pgque.consumer c where c.co_name = name for key share;
    if found then
      return v_id;
    end if;
    insert into pgque.consumer (co_name) values (name) on conflict (co_name) do nothing;
  end loop;
  raise exception 'consumer % is being unregistered over and over', name using errcode = 'serialization_failure';
end $$;

-- pgque.subscribe_at_newest(queue_id, consumer, role) -> boolean; internal
-- Adds a main row at the newest tick. Result: false when the consumer already stands there. Tables: subscription (insert),
-- tick (read), consumer (insert).
-- Hazard: maint() trims ticks below the lowest subscription it can see. The table lock comes before the newest tick is
-- read; the trimming takes the opposite lock, so it cannot remove the tick a registration has just chosen.
create or replace function pgque.subscribe_at_newest(queue_id int, consumer text, role text) returns boolean
language plpgsql set search_path = pg_catalog, pgque, pg_temp
as $$
declare
  v_consumer int := pgque.consumer_id(consumer);
begin
  lock table pgque.subscription in row exclusive mode;
  insert into pgque.subscription (sub_queue, sub_consumer, sub_id, sub_role, sub_start_tick)
  select queue_id, v_consumer, nextval('pgque.subscription_id_seq'), role, t.tick_id
    from pgque.tick t where t.tick_queue = queue_id order by t.tick_id desc limit 1
  on conflict (sub_queue, sub_consumer) do nothing;
  return found;
end $$;

-- pgque.register_consumer(queue_name, consumer_id) -> int
-- Parameters: consumer_id is the consumer's name, as the API has it. Result: 1 new, 0 already registered. It starts at the newest tick.
-- Tables: subscription, consumer (insert), tick (read).
create or replace function pgque.register_consumer(queue_name text, consumer_id text) returns int
language plpgsql security definer set search_path = pg_catalog, pgque, pg_temp
as $$
declare
  v_queue int := pgque.queue_id(queue_name);
begin
  if consumer_id is null or consumer_id = '' then
    raise exception 'a consumer needs a name' using errcode = 'invalid_name';
  end if;
  if exists (select from pgque.subscription s join pgque.consumer c on c.co_id = s.sub_consumer
              where s.sub_queue = v_queue and c.co_name = consumer_id and s.sub_role = 'coop_member') then
    raise exception 'consumer % is a member of a cooperative group', consumer_id using errcode = 'object_in_use';
  end if;
  return pgque.subscribe_at_newest(v_queue, consumer_id, 'normal')::int;
end $$;

-- pgque.forget(queue_id, consumer_id); internal: deletes a subscription row, and the consumer when nothing else refers to it.
-- Tables: subscription, consumer (delete).
create or replace function pgque.forget(queue_id int, consumer_id int) returns void
language plpgsql set search_path = pg_catalog, pgque, pg_temp
as $$
begin
  delete from pgque.subscription s where s.sub_queue = queue_id and s.sub_consumer = consumer_id;
  delete from pgque.consumer c
   where c.co_id = consumer_id and not exists (select from pgque.subscription s where s.sub_consumer = consumer_id);
end $$;

-- pgque.unregister_consumer(queue_name, consumer_name) -> int
-- Result: how many subscriptions went, 0 or 1. Tables: subscription, batch, batch_end, consumer (delete).
-- Hazard: a cooperative main row is its group's cursor; refused while members are registered.
create or replace function pgque.unregister_consumer(queue_name text, consumer_name text) returns int
language plpgsql security definer set search_path = pg_catalog, pgque, pg_temp
as $$
declare
  v_queue int := pgque.queue_id(queue_name);
  v_sub record;
begin
  select s.sub_id, s.sub_consumer, s.sub_role into v_sub
    from pgque.subscription s join pgque.consumer c on c.co_id = s.sub_consumer
   where s.sub_queue = v_queue and c.co_name = consumer_name for update of s;
  if not found then
    return 0;
  end if;
  if v_sub.sub_role <> 'normal' then
    raise exception 'consumer % on queue % is cooperative (%): unregister its subconsumers first', consumer_name, queue_name, v_sub.sub_role
      using errcode = 'object_in_use', hint = 'unregister_subconsumer(queue, consumer, subconsumer)';
  end if;
  with gone as (delete from pgque.batch b where b.batch_sub = v_sub.sub_id returning b.batch_id)
  delete from pgque.batch_end e using gone where e.batch_id = gone.batch_id;
  perform pgque.forget(v_queue, v_sub.sub_consumer);
  return 1;
end $$;

-- pgque.member_name(consumer, subconsumer) -> text; internal
-- Result: the consumer name of a member. Hazard: a dot in either part would let two pairs share one name; refused.
create or replace function pgque.member_name(consumer text, subconsumer text) returns text
language plpgsql immutable set search_path = pg_catalog, pgque, pg_temp
as $$
begin
  if consumer is null or subconsumer is null or consumer = '' or subconsumer = '' or strpos(consumer || subconsumer, '.') > 0 then
    raise exception 'cooperative names must not be empty or contain a dot: %, %', consumer, subconsumer using errcode = 'invalid_name';
  end if;
  return consumer || '.' || subconsumer;
end $$;

-- pgque.lock_main(queue_id, consumer, convert_normal) -> record (sub_id, sub_start_tick); internal
-- The main row of a group, locked; made when missing, turned from normal to coop_main when allowed.
-- Tables: subscription (row lock, insert, update).
-- Hazard: an open batch of the normal consumer would belong to nobody after the conversion; refused.
create or replace function pgque.lock_main(queue_id int, consumer text, convert_normal boolean, out sub_id int, out sub_start_tick bigint)
language plpgsql set search_path = pg_catalog, pgque, pg_temp
as $$
declare
  v_sub record;
begin
  perform pgque.subscribe_at_newest(queue_id, consumer, 'coop_main');
  select s.* into v_sub from pgque.subscription s join pgque.consumer c on c.co_id = s.sub_consumer
   where s.sub_queue = queue_id and c.co_name = consumer for update of s;
  if v_sub.sub_role = 'normal' then
    if convert_normal is not true then
      raise exception 'consumer % is a normal consumer, not a cooperative one', consumer
        using errcode = 'object_in_use', hint = 'pass convert_normal := true';
    end if;
    if exists (select from pgque.subscription_state t
                where t.sub_queue = queue_id and t.sub_consumer = v_sub.sub_consumer and t.batch_id is not null) then
      raise exception 'consumer % has an open batch and cannot be converted', consumer using errcode = 'object_in_use';
    end if;
    update pgque.subscription s set sub_role = 'coop_main' where s.sub_queue = queue_id and s.sub_consumer = v_sub.sub_consumer;
  end if;
  sub_id := v_sub.sub_id;
  sub_start_tick := v_sub.sub_start_tick;
end $$;

-- pgque.register_subconsumer(queue, consumer, subconsumer, convert_normal) -> int
-- Parameters: convert_normal lets an idle normal consumer become a group. Result: 1 new, 0 already registered.
-- Tables: subscription, consumer (insert), tick (read). Locks the main row first, as every cooperative path does.
create or replace function pgque.register_subconsumer(queue text, consumer text, subconsumer text, convert_normal boolean default false) returns int
language plpgsql security definer set search_path = pg_catalog, pgque, pg_temp
as $$
declare
  v_queue int := pgque.queue_id(queue);
  v_name text := pgque.member_name(consumer, subconsumer);
  v_main record;
  v_member record;
begin
  if current_setting('transaction_isolation') in ('repeatable read', 'serializable') then
    perform pgque.refuse_isolation('register_subconsumer');
  end if;
  v_main := pgque.lock_main(v_queue, consumer, convert_normal);
  insert into pgque.subscription (sub_queue, sub_consumer, sub_id, sub_role, sub_start_tick)
  values (v_queue, pgque.consumer_id(v_name), v_main.sub_id, 'coop_member', v_main.sub_start_tick)
  on conflict (sub_queue, sub_consumer) do nothing;
  if found then
    return 1;
  end if;
  select s.sub_id, s.sub_role into v_member from pgque.subscription s join pgque.consumer c on c.co_id = s.sub_consumer
   where s.sub_queue = v_queue and c.co_name = v_name;
  if v_member.sub_role <> 'coop_member' or v_member.sub_id <> v_main.sub_id then
    raise exception 'consumer % is already registered in its own right', v_name using errcode = 'object_in_use';
  end if;
  return 0;
end $$;

-- pgque.unregister_subconsumer(queue, consumer, subconsumer, batch_handling) -> int
-- Parameters: batch_handling 0 refuses a member that holds a batch; 1 (its events into the retry queue) is not supported.
-- Result: how many members went, 0 or 1; with the last one the consumer is normal again. Tables: subscription (delete, update),
-- consumer (delete). Batch rows stay: the group's position stands in them.
-- Hazard: an active batch of a member that is gone would never be read again.
create or replace function pgque.unregister_subconsumer(queue text, consumer text, subconsumer text, batch_handling int default 0) returns int
language plpgsql security definer set search_path = pg_catalog, pgque, pg_temp
as $$
declare
  v_queue int := pgque.queue_id(queue);
  v_name text := pgque.member_name(consumer, subconsumer);
  v_main record;
  v_member record;
begin
  if batch_handling is null or batch_handling not in (0, 1) then
    raise exception 'batch_handling must be 0 or 1, not %', batch_handling using errcode = 'invalid_parameter_value';
  end if;
  select s.sub_id, s.sub_consumer into v_main from pgque.subscription s join pgque.consumer c on c.co_id = s.sub_consumer
   where s.sub_queue = v_queue and c.co_name = consumer and s.sub_role = 'coop_main' for update of s;
  select t.sub_consumer, t.batch_id into v_member from pgque.subscription_state t join pgque.consumer c on c.co_id = t.sub_consumer
   where t.sub_queue = v_queue and c.co_name = v_name and t.sub_id = v_main.sub_id and t.sub_role = 'coop_member';
  if not found then
    return 0;
  end if;
  if v_member.batch_id is not null and batch_handling = 0 then
    raise exception 'subconsumer % holds batch %', v_name, v_member.batch_id
      using errcode = 'object_in_use', hint = 'finish it, or let a sibling take it over';
  elsif v_member.batch_id is not null then
    raise exception 'subconsumer % holds batch %: sending it through a retry queue is not supported', v_name, v_member.batch_id
      using errcode = 'feature_not_supported', hint = 'finish it, or let a sibling take it over';
  end if;
  perform pgque.forget(v_queue, v_member.sub_consumer);
  if not exists (select from pgque.subscription s where s.sub_id = v_main.sub_id and s.sub_role = 'coop_member') then
    update pgque.subscription s set sub_role = 'normal' where s.sub_queue = v_queue and s.sub_consumer = v_main.sub_consumer;
  end if;
  return 1;
end $$;

-- pgque.touch_subconsumer(queue, consumer, subconsumer) -> int
-- A member's heartbeat: its batch counts as active from now. Result: rows touched, 0 for an unknown member.
-- Tables: subscription (update). Hazard: a handler slower than dead_interval loses its batch to a sibling without it.
create or replace function pgque.touch_subconsumer(queue text, consumer text, subconsumer text) returns int
language plpgsql security definer set search_path = pg_catalog, pgque, pg_temp
as $$
declare
  v_touched int;
begin
  update pgque.subscription s set sub_active = clock_timestamp()
    from pgque.consumer c
   where s.sub_queue = pgque.queue_id(queue) and c.co_id = s.sub_consumer
     and c.co_name = consumer || '.' || subconsumer and s.sub_role = 'coop_member';
  get diagnostics v_touched = row_count;
  return v_touched;
end $$;
