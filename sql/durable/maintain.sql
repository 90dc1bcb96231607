-- durable.add_partitions(days): day partitions of started and finished from yesterday to that many days ahead. How many were made.
-- Made detached and attached, because "create … partition of" waits behind every open reader; the caller sets lock_timeout.
create or replace function durable.add_partitions(i_days int default 14) returns int
language plpgsql security definer
set search_path = pg_catalog, durable, pg_temp
as $$
declare
    v_made int;
begin
    select sum(durable.add_day(n, d)) into v_made
    from generate_series(durable.today() - 1, durable.today() + i_days) d, unnest(array['started', 'finished']) n;
    return v_made;
end
$$;

-- durable.add_day(table, day): the partition of one day, if it is not there. How many were made: 0 or 1.
create or replace function durable.add_day(i_table text, i_day int) returns int
language plpgsql
set search_path = pg_catalog, durable, pg_temp
as $$
declare
    v_has_rows boolean;
begin
    if to_regclass(format('durable.%s_%s', i_table, i_day)) is not null then
        return 0;
    end if;
    execute format('create table durable.%1$s_%2$s (like durable.%1$s including all)', i_table, i_day);
    -- A day that began without its partition has rows in the default one: they move, while nobody adds to them.
    execute format('select exists (select 1 from durable.%s_default where day = %s)', i_table, i_day) into v_has_rows;
    if v_has_rows then
        execute format('lock table durable.%s_default in share row exclusive mode', i_table);
        execute format('with moved as (delete from durable.%1$s_default where day = %2$s returning *)'
            ' insert into durable.%1$s_%2$s select * from moved', i_table, i_day);
    end if;
    execute format('alter table durable.%1$s attach partition durable.%1$s_%2$s for values from (%2$s) to (%3$s)',
        i_table, i_day, i_day + 1);
    return 1;
end
$$;

-- durable.needs_partitions(): a read that tells whether durable.add_partitions has something to do within a week.
create or replace function durable.needs_partitions() returns boolean
language sql stable security definer
set search_path = pg_catalog, durable, pg_temp
as $$ select to_regclass('durable.finished_' || (durable.today() + 7)) is null $$;

-- durable.needs_upkeep(): a read that tells whether the engine's upkeep has something to do: a queue in between the two steps of
-- its rotation; one whose period is over and whose tables hold anything (an idle log is rotated until it is empty, and then left
-- alone); one with more than 10,000 ticks to trim.
create or replace function durable.needs_upkeep() returns boolean
language sql stable security definer
set search_path = pg_catalog, durable, pg_temp
as $$
    select exists (
        select 1 from pgque.queue q
        where q.queue_switch_step2 is null
            or (q.queue_switch_time + q.queue_rotation_period < clock_timestamp()
                and exists (select 1 from generate_series(0, q.queue_ntables - 1) n
                            where pg_relation_size((q.queue_data_pfx || '_' || n)::regclass) > 0))
            or (select t.tick_id from pgque.tick t where t.tick_queue = q.queue_id order by t.tick_id desc limit 1)
                - (select t.tick_id from pgque.tick t where t.tick_queue = q.queue_id order by t.tick_id limit 1) > 10000)
$$;

-- durable.try_maintenance(what): whether this transaction may do it: one host at a time, nobody waits.
create or replace function durable.try_maintenance(i_what text) returns boolean
language sql volatile
as $$ select pg_try_advisory_xact_lock(hashtextextended('durable ' || i_what, 0)) $$;

-- durable.keep_up(lag_s), durable.finish_rotation(): the engine's upkeep, each in its own transaction; before it the idle shards, and the readers
-- of the timeline that are more than so many seconds behind: whatever has become of them, they hold no log back for longer.
create or replace function durable.keep_up(i_lag_s float8 default 300) returns int
language plpgsql security definer
set search_path = pg_catalog, durable, pg_temp
as $$
begin
    if not durable.try_maintenance('rotate') then
        return 0;
    end if;
    perform durable.tick_idle(s.shard) from durable.shard s;
    perform durable.skip_timelines(i_lag_s);
    return pgque.maint();
end
$$;

create or replace function durable.finish_rotation() returns int
language plpgsql security definer
set search_path = pg_catalog, durable, pg_temp
as $$
begin
    if not durable.try_maintenance('rotate') then
        return 0;
    end if;
    return pgque.maint_rotate_tables_step2();
end
$$;

-- durable.tick_idle(shard): moves a shard where nothing happens past its last rotation, so that the next one may empty a table.
-- An empty window, opened and finished here; not while anything waits to be read.
create or replace function durable.tick_idle(i_shard int) returns void
language plpgsql
set search_path = pg_catalog, durable, pg_temp
as $$
declare
    v_shard durable.shard;
    v_batch bigint;
begin
    perform durable.demand_read_committed();
    select s.* into v_shard from durable.shard s where s.shard = i_shard for update skip locked;
    if not found or durable.has_events(v_shard.queue_id) or not exists (
        select 1 from pgque.queue q where q.queue_id = v_shard.queue_id
            and (select pg_snapshot_xmin(t.tick_snapshot) from pgque.tick t where t.tick_queue = q.queue_id
                 order by t.tick_id desc limit 1) <= q.queue_switch_step2)
    then
        return;
    end if;
    perform pgque.ticker(v_shard.queue, t.tick_id + 1, clock_timestamp(), t.tick_event_seq)
    from (select k.tick_id, k.tick_event_seq from pgque.tick k where k.tick_queue = v_shard.queue_id
          order by k.tick_id desc limit 1) t;
    -- What was committed between the look and the tick is in this window: then it stays open, silent, for a consumer.
    perform durable.join_shard(i_shard, 'maintenance');
    v_batch := pgque.next_batch(v_shard.queue, durable.consumer_of(i_shard), 'maintenance');
    if v_batch is null then
        return;
    end if;
    insert into durable.win (batch, shard, owner, s0, s1, active)
    select v_batch, i_shard, 0, p.tick_snapshot, n.tick_snapshot, '-infinity'
    from pgque.get_batch_info(v_batch) b
    join pgque.tick p on p.tick_queue = v_shard.queue_id and p.tick_id = b.prev_tick_id
    join pgque.tick n on n.tick_queue = v_shard.queue_id and n.tick_id = b.tick_id
    on conflict do nothing;
end
$$;

-- durable.dead_members(): readers whose process is not connected, that have been silent for a minute.
create or replace function durable.dead_members() returns table (queue text, consumer text, member text)
language sql stable security definer
set search_path = pg_catalog, durable, pg_temp
as $$
    select q.queue_name, split_part(c.co_name, '.', 1), split_part(c.co_name, '.', 2)
    from pgque.subscription s
    join pgque.consumer c on c.co_id = s.sub_consumer
    join pgque.queue q on q.queue_id = s.sub_queue
    join durable.shard d on d.queue = q.queue_name
    where s.sub_role = 'coop_member' and split_part(c.co_name, '.', 2) <> 'maintenance'
        and s.sub_active < clock_timestamp() - interval '1 minute'
        and not exists (select 1 from pg_stat_activity a
                        where a.application_name like 'durable-cluster shard % ' || split_part(c.co_name, '.', 2))
        and not exists (select 1 from pgque.batch b where b.batch_member = c.co_id
                        and not exists (select 1 from pgque.batch_end e where e.batch_id = b.batch_id))
$$;

-- durable.sweep_members(): unregisters the dead members. How many went.
create or replace function durable.sweep_members() returns int
language plpgsql security definer
set search_path = pg_catalog, durable, pg_temp
as $$
declare
    v_gone int := 0;
begin
    if durable.try_maintenance('members') then
        select count(pgque.unregister_subconsumer(m.queue, m.consumer, m.member)) into v_gone from durable.dead_members() m;
    end if;
    return v_gone;
end
$$;

-- durable.overdue(): how late the oldest timer is and the oldest due time of a schedule, in seconds (null: none is late), and how many
-- schedules are due. Reads only.
create or replace function durable.overdue(out timers_s float8, out schedules_s float8, out schedules int)
language sql stable security definer
set search_path = pg_catalog, durable, pg_temp
as $$
    select
        (select extract(epoch from durable.timer_now() - t.due)::float8 from durable.timer_control c, durable.timer t
         where (t.due, t.id) > (c.reached_due, c.reached_id) and t.due <= durable.timer_now() order by t.due, t.id limit 1),
        extract(epoch from durable.now() - min(s.next_due))::float8, count(*)::int
    from durable.schedule s where s.paused_at is null and s.next_due > s.since and s.next_due <= durable.now()
$$;

-- durable.maintain(retention_days): what can be done without a cluster, for pg_cron or any other scheduler; as often as timers may be
-- late. Beside a cluster it does no harm: what is being done already is left alone. Nothing to do: nothing is written.
--   i_retention_days  let history go that is older than so many days, a day a call; null, the default: none
-- Result: timers fired (at most 20,000 a call); runs of schedules that waited and were started; logs rotated; timers_carried by a
-- rotation of the timers; chunks_carried by one of the memos' chunks; partitions made; names, cancels and counts of limits of
-- what is gone forgotten; days dropped; whether work waits for a
-- cluster; schedules whose due time has come, which only a cluster can fire. Errors: DC004, DC002.
-- Hazards: the second half of a rotation demands a transaction without an id, so it comes first. A rotation ticks idle logs, and
-- nothing may be appended after a tick's snapshot; so a call that fires does not rotate.
create or replace function durable.maintain(i_retention_days int default null, out timers int, out queued_runs int, out rotated int,
    out timers_carried int, out chunks_carried int, out partitions int, out forgotten int, out days_dropped int, out has_work boolean, out schedules_due int)
language plpgsql security definer
set search_path = pg_catalog, durable, pg_temp
as $$
begin
    perform durable.demand_read_committed();
    rotated := case when pg_current_xact_id_if_assigned() is null then durable.finish_rotation() else 0 end;
    timers := durable.sweep(20000);
    queued_runs := durable.start_queued();
    -- Before a rotation, which passes over what is not read for too long.
    begin
        perform durable.project_timeline(s.shard, '1 hour') from durable.shard s;
    exception when others then
        -- Its reader is passed over some day; nothing else waits for it.
        raise warning 'the timeline cannot be written: %', sqlerrm;
    end;
    timers_carried := 0;
    if timers = 0 and queued_runs = 0 then
        rotated := rotated + case when durable.needs_upkeep() then durable.keep_up() else 0 end;
        timers_carried := case when durable.needs_timer_rotation() then greatest(durable.rotate_timers(), 0) else 0 end;
    end if;
    chunks_carried := case when durable.needs_spill_rotation() then greatest(durable.rotate_spill(), 0) else 0 end;
    forgotten := case when exists (select from durable.dead_members()) then durable.sweep_members() else 0 end
        + case when durable.has_ended_cancels() then durable.sweep_cancels() else 0 end
        + case when durable.has_unused_limits() then durable.sweep_limits() else 0 end;
    select l.partitions, l.days_dropped into maintain.partitions, maintain.days_dropped from durable.maintain_days(i_retention_days) l;
    schedules_due := (select o.schedules from durable.overdue() o);
    has_work := exists (select from durable.detached)
        or exists (select from durable.shard s where not s.is_paused
                   and (durable.has_events(s.queue_id) or exists (select from durable.win w where w.shard = s.shard)));
end
$$;

-- durable.maintain_days(retention_days): partitions ahead, and the oldest day that is expired. Who waits for a table's strongest lock lets
-- nobody else pass, so it waits half a second, and leaves it to the next call.
create or replace function durable.maintain_days(i_retention_days int, out partitions int, out days_dropped int)
language plpgsql
set search_path = pg_catalog, durable, pg_temp set lock_timeout = '500ms'
as $$
begin
    partitions := 0;
    days_dropped := 0;
    if durable.needs_partitions() and durable.try_maintenance('partitions') then
        partitions := durable.add_partitions();
    end if;
    if i_retention_days is not null and durable.needs_expiry(i_retention_days) then
        days_dropped := durable.expire(i_retention_days);
    end if;
    if i_retention_days is not null and durable.needs_timeline_upkeep(i_retention_days) then
        perform durable.keep_timeline(i_retention_days);
    end if;
exception when lock_not_available or deadlock_detected then
    partitions := 0;
    days_dropped := 0;
end
$$;
