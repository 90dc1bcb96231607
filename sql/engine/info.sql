-- Info: queues, consumers and batches, for people and monitors.

-- pgque.get_queue_info(queue) -> setof record
-- Parameters: null for all queues. ev_per_sec over the ticks kept; ev_new since the newest tick. Tables: queue, tick (read).
create or replace function pgque.get_queue_info(queue text, out queue_name text, out queue_ntables int, out queue_cur_table int,
  out queue_rotation_period interval, out queue_switch_time timestamptz, out queue_external_ticker boolean,
  out queue_ticker_paused boolean, out queue_ticker_max_count int, out queue_ticker_max_lag interval,
  out queue_ticker_idle_period interval, out ticker_lag interval, out ev_per_sec double precision, out ev_new bigint, out last_tick_id bigint)
returns setof record
language sql stable security definer set search_path = pg_catalog, pgque, pg_temp
as $$
  select q.queue_name, q.queue_ntables, q.queue_cur_table, q.queue_rotation_period, q.queue_switch_time, q.queue_external_ticker,
         q.queue_ticker_paused, q.queue_ticker_max_count, q.queue_ticker_max_lag, q.queue_ticker_idle_period,
         clock_timestamp() - last.tick_time,
         (last.tick_event_seq - first.tick_event_seq) / nullif(extract(epoch from last.tick_time - first.tick_time)::float8, 0),
         greatest(coalesce(pg_sequence_last_value(q.queue_event_seq::regclass), 0) - last.tick_event_seq, 0), last.tick_id
    from pgque.queue q
    left join lateral (select t.* from pgque.tick t where t.tick_queue = q.queue_id order by t.tick_id desc limit 1) last on true
    left join lateral (select t.* from pgque.tick t where t.tick_queue = q.queue_id order by t.tick_id limit 1) first on true
   where $1 is null or q.queue_name = $1
   order by q.queue_name
$$;

-- pgque.get_queue_info() -> setof record: all queues.
create or replace function pgque.get_queue_info(out queue_name text, out queue_ntables int, out queue_cur_table int,
  out queue_rotation_period interval, out queue_switch_time timestamptz, out queue_external_ticker boolean,
  out queue_ticker_paused boolean, out queue_ticker_max_count int, out queue_ticker_max_lag interval,
  out queue_ticker_idle_period interval, out ticker_lag interval, out ev_per_sec double precision, out ev_new bigint, out last_tick_id bigint)
returns setof record
language sql stable security definer set search_path = pg_catalog, pgque, pg_temp
as $$ select * from pgque.get_queue_info(null) $$;

-- pgque.get_consumer_info(queue, consumer) -> setof record
-- Parameters: null widens. A member shows its open batch only; its group's position stands in the main row.
-- lag: age of the tick it stands at; pending_events: from there to the newest event. Tables: as subscription_state, queue, tick (read).
create or replace function pgque.get_consumer_info(queue text, consumer text, out queue_name text, out consumer_name text, out lag interval,
  out last_seen interval, out last_tick bigint, out current_batch bigint, out next_tick bigint, out pending_events bigint)
returns setof record
language sql stable security definer set search_path = pg_catalog, pgque, pg_temp
as $$
  select q.queue_name, c.co_name, clock_timestamp() - p.tick_time, clock_timestamp() - greatest(s.last_active, e.end_time),
         at.tick, s.batch_id, s.next_tick,
         greatest(coalesce(pg_sequence_last_value(q.queue_event_seq::regclass), 0) - p.tick_event_seq, 0)
    from pgque.subscription_state s
    join pgque.queue q on q.queue_id = s.sub_queue
    join pgque.consumer c on c.co_id = s.sub_consumer
   cross join lateral (select coalesce(s.prev_tick, case when s.sub_role <> 'coop_member' then s.reached_tick end) as tick) at
    left join pgque.tick p on p.tick_queue = s.sub_queue and p.tick_id = at.tick
    left join pgque.batch_end e on e.batch_id = s.newest_batch
   where ($1 is null or q.queue_name = $1) and ($2 is null or c.co_name = $2)
   order by q.queue_name, c.co_name
$$;

-- pgque.get_consumer_info(queue) -> setof record: all consumers of one queue.
create or replace function pgque.get_consumer_info(queue text, out queue_name text, out consumer_name text, out lag interval,
  out last_seen interval, out last_tick bigint, out current_batch bigint, out next_tick bigint, out pending_events bigint)
returns setof record
language sql stable security definer set search_path = pg_catalog, pgque, pg_temp
as $$ select * from pgque.get_consumer_info($1, null) $$;

-- pgque.get_consumer_info() -> setof record: all consumers of all queues.
create or replace function pgque.get_consumer_info(out queue_name text, out consumer_name text, out lag interval,
  out last_seen interval, out last_tick bigint, out current_batch bigint, out next_tick bigint, out pending_events bigint)
returns setof record
language sql stable security definer set search_path = pg_catalog, pgque, pg_temp
as $$ select * from pgque.get_consumer_info(null, null) $$;

-- pgque.get_batch_info(batch_id) -> record
-- Result: the bounds of an open batch; nulls when it is not open. Tables: batch, batch_end, subscription, queue, consumer, tick (read).
create or replace function pgque.get_batch_info(batch_id bigint, out queue_name text, out consumer_name text, out batch_start timestamptz,
  out batch_end timestamptz, out prev_tick_id bigint, out tick_id bigint, out lag interval, out seq_start bigint, out seq_end bigint)
language sql stable security definer set search_path = pg_catalog, pgque, pg_temp
as $$
  select q.queue_name, c.co_name, p.tick_time, n.tick_time, p.tick_id, n.tick_id, clock_timestamp() - n.tick_time,
         p.tick_event_seq, n.tick_event_seq
    from pgque.batch b
    join pgque.subscription s on s.sub_id = b.batch_sub and s.sub_consumer = b.batch_member
    join pgque.queue q on q.queue_id = s.sub_queue
    join pgque.consumer c on c.co_id = s.sub_consumer
    join pgque.tick p on p.tick_queue = s.sub_queue and p.tick_id = b.batch_prev_tick
    join pgque.tick n on n.tick_queue = s.sub_queue and n.tick_id = b.batch_next_tick
   where b.batch_id = $1 and not exists (select from pgque.batch_end e where e.batch_id = b.batch_id)
$$;
