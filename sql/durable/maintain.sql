-- durable.add_partitions(days): day partitions of started and finished from yesterday to that many days ahead. How many were made.
-- Made detached and attached, because "create … partition of" waits behind every open reader; the caller sets lock_timeout.
create or replace function durable.add_partitions(i_days int default 14) returns int
language plpgsql
set search_path = pg_catalog, durable, pg_temp
as $$
declare
    v_name text;
    v_made int := 0;
begin
    for v_day in durable.today() - 1 .. durable.today() + i_days loop
        foreach v_name in array array['started', 'finished'] loop
            if to_regclass(format('durable.%s_%s', v_name, v_day)) is null then
                execute format('create table durable.%1$s_%2$s (like durable.%1$s including all)', v_name, v_day);
                execute format('alter table durable.%1$s attach partition durable.%1$s_%2$s for values from (%2$s) to (%3$s)',
                    v_name, v_day, v_day + 1);
                v_made := v_made + 1;
            end if;
        end loop;
    end loop;
    return v_made;
end
$$;

-- durable.needs_partitions(): a read that tells whether durable.add_partitions has something to do within a week.
create or replace function durable.needs_partitions() returns boolean
language sql stable
as $$ select to_regclass('durable.finished_' || (durable.today() + 7)) is null $$;

-- durable.needs_rotation(): a read that tells whether pgque.maint or the second rotation step may have something to do:
-- a rotation in between its steps, or a period that is over with something read since.
create or replace function durable.needs_rotation() returns boolean
language sql stable
as $$
    select exists (
        select 1 from pgque.queue q
        where q.queue_switch_step2 is null
            or (q.queue_switch_time + q.queue_rotation_period < clock_timestamp()
                and exists (select 1 from pgque.tick t where t.tick_queue = q.queue_id and t.tick_time > q.queue_switch_time)))
$$;

-- durable.sweep_members(): unregisters readers whose process is not connected and who hold no window. How many went.
create or replace function durable.sweep_members(i_silent interval default '1 hour') returns int
language plpgsql
set search_path = pg_catalog, durable, pg_temp
as $$
declare
    v_member record;
    v_gone int := 0;
begin
    for v_member in
        select q.queue_name, split_part(c.co_name, '.', 1) as consumer, split_part(c.co_name, '.', 2) as member
        from pgque.subscription s
        join pgque.consumer c on c.co_id = s.sub_consumer
        join pgque.queue q on q.queue_id = s.sub_queue
        where s.sub_role = 'coop_member' and s.sub_active < clock_timestamp() - i_silent
            and q.queue_name in (select d.queue from durable.shard d)
            and not exists (select 1 from pg_stat_activity a
                            where a.application_name like 'durable-cluster %' || split_part(c.co_name, '.', 2))
    loop
        begin
            perform pgque.unregister_subconsumer(v_member.queue_name, v_member.consumer, v_member.member);
            v_gone := v_gone + 1;
        exception when raise_exception then
            null;  -- it still holds a window that nobody has taken over yet
        end;
    end loop;
    return v_gone;
end
$$;
