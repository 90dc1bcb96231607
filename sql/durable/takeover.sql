-- durable.take_over(shard, owner, dead): gives the longest silent window of the shard to a new owner; its batch, or null.
-- The row is locked with skip locked: a page commit in flight holds it, and a process stopped inside that commit must not
-- hold up the shard. The old owner's next fence fails, because the owner's bits differ.
create or replace function durable.take_over(i_shard int, i_owner bigint, i_dead interval) returns bigint
language plpgsql
set search_path = pg_catalog, durable, pg_temp
as $$
declare
    v_batch bigint;
begin
    select w.batch into v_batch from durable.win w
    where w.shard = i_shard and w.active < durable.now() - i_dead and w.owner <> i_owner
    order by w.active limit 1 for update skip locked;
    if found then
        update durable.win w set owner = i_owner, takeovers = w.takeovers + 1, active = durable.now() where w.batch = v_batch;
    end if;
    return v_batch;
end
$$;

-- durable.heartbeat(owners): the supervisor's word that these processes live; says so only for windows they hold. Rows touched.
create or replace function durable.heartbeat(i_owners bigint[]) returns int
language plpgsql security definer
set search_path = pg_catalog, durable, pg_temp
as $$
declare
    v_rows int;
begin
    update durable.win w set active = durable.now()
    where w.batch in (select x.batch from durable.win x where x.owner = any (i_owners) and x.active > '-infinity'
                          and x.active < durable.now() - interval '1 second'
                      for update skip locked);
    get diagnostics v_rows = row_count;
    return v_rows;
end
$$;

-- durable.abandon(owner): the supervisor's word that this process is gone: its windows are free at once. Shards concerned.
-- Waits for a commit the dead process may have had in flight.
create or replace function durable.abandon(i_owner bigint) returns int[]
language sql security definer
set search_path = pg_catalog, durable, pg_temp
as $$
    with gone as (update durable.win w set active = '-infinity' where w.owner = i_owner returning w.shard)
    select coalesce(array_agg(distinct g.shard), '{}') from gone g
$$;
