-- durable.take_over(shard, owner, dead): gives the longest silent window of the shard to a new owner; its batch, or null.
-- The row is locked with skip locked: a page commit in flight holds it, and a process stopped inside that commit must not
-- hold up the shard. The old owner's next fence fails, because the owner's bits differ.
-- An owner that fell silent by itself has not crashed: the mark that it may have set before a suspect's run is taken back.
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
        update durable.win w
        set owner = i_owner, takeovers = w.takeovers + 1, active = durable.now(),
            crashes = greatest(w.crashes - (w.active > '-infinity')::int, 0)
        where w.batch = v_batch;
    end if;
    return v_batch;
end
$$;

-- durable.has_orphans(): whether a process that has no session (any more) holds a window or runs detached steps: once it has been silent
-- for long enough, others go on with them. Reads only; a consumer's session bears its owner's bits in its name.
create or replace function durable.has_orphans() returns boolean
language sql volatile
set search_path = pg_catalog, durable, pg_temp
as $$
    select exists (
        select from (select w.owner from durable.win w join durable.shard s on s.shard = w.shard and not s.is_paused
                     union all select l.owner from durable.lease l
                     where exists (select from durable.detached d where d.owner = l.owner)) held
        where not exists (
            select from pg_stat_activity a
            where a.datname = current_database() and a.application_name like '% c' || lpad(to_hex(held.owner), 16, '0')))
$$;

-- durable.mark_suspect(batch, owner, done): before a suspect runs: one crash more, committed first. How many that makes.
create or replace function durable.mark_suspect(i_batch bigint, i_owner bigint, i_done durable.cursor) returns int
language plpgsql security definer
set search_path = pg_catalog, durable, pg_temp
as $$
declare
    v_crashes int;
begin
    update durable.win w set crashes = w.crashes + 1, active = durable.now()
    where w.batch = i_batch and w.owner = i_owner and w.done = i_done returning w.crashes into v_crashes;
    if not found then
        perform durable.lost(i_batch);
    end if;
    return v_crashes;
end
$$;

-- durable.heartbeat(owners): the supervisor's word that these processes live; says so only for what they hold. Rows touched.
create or replace function durable.heartbeat(i_owners bigint[]) returns int
language plpgsql security definer
set search_path = pg_catalog, durable, pg_temp
as $$
declare
    v_rows int;
    v_leases int;
begin
    update durable.win w set active = durable.now()
    where w.batch in (select x.batch from durable.win x where x.owner = any (i_owners) and x.active > '-infinity'
                          and x.active < durable.now() - interval '1 second'
                      for update skip locked);
    get diagnostics v_rows = row_count;
    update durable.lease l set active = durable.now()
    where l.owner in (select x.owner from durable.lease x where x.owner = any (i_owners)
                          and x.active < durable.now() - interval '1 second'
                          and exists (select from durable.detached d where d.owner = x.owner)
                      for update skip locked);
    get diagnostics v_leases = row_count;
    return v_rows + v_leases;
end
$$;

-- durable.abandon(owner, suspects): the supervisor's word that this process is gone: its windows and detached steps are free at
-- once. Shards whose windows that concerns. Waits for a commit the dead process may have had in flight.
--   i_suspects  lines of a page, if the process died of itself: then what it ran becomes suspect. A line that was marked as running
--               alone is the culprit; without one, a detached step that ran alone is blamed, and the lines of the page are suspects
--               beside it. 0 for a process that was ended from outside: that makes nobody a suspect.
create or replace function durable.abandon(i_owner bigint, i_suspects int default 0) returns int[]
language plpgsql security definer
set search_path = pg_catalog, durable, pg_temp
as $$
declare
    v_is_marked boolean := exists (select from durable.win w where w.owner = i_owner and w.crashes > 0);
    v_shards int[];
begin
    with gone as (
        update durable.win w
        set active = '-infinity',
            suspects = case when i_suspects > 0 and w.crashes > 0 then greatest(w.suspects, 1)
                            when i_suspects > 0 and not v_is_marked then i_suspects else w.suspects end,
            crashes = case when i_suspects > 0 then w.crashes else greatest(w.crashes - 1, 0) end
        where w.owner = i_owner returning w.shard)
    select coalesce(array_agg(distinct g.shard), '{}') into v_shards from gone g;
    perform durable.hand_back(i_owner, i_suspects > 0 and not v_is_marked);
    return v_shards;
end
$$;

-- durable.holdings(owner): after a lost connection: which windows are still this owner's. Waits for a commit that was on its way
-- when the connection was lost: only then is its outcome known.
create or replace function durable.holdings(i_owner bigint) returns table (shard int, batch bigint)
language sql security definer
set search_path = pg_catalog, durable, pg_temp
as $$ select w.shard, w.batch from durable.win w where w.owner = i_owner and w.active > '-infinity' order by w.batch for update $$;

-- durable.reincarnate(old, new): a process that lost a window comes back under new bits: its other windows are free, what it
-- runs detached and nobody else was given stays its own.
create or replace function durable.reincarnate(i_old bigint, i_new bigint) returns void
language plpgsql security definer
set search_path = pg_catalog, durable, pg_temp
as $$
begin
    update durable.win w set active = '-infinity' where w.owner = i_old;
    insert into durable.lease (owner, active) select i_new, durable.now() where exists (select from durable.detached d where d.owner = i_old);
    update durable.detached d set owner = i_new
    where (d.id, d.seq) in (select x.id, x.seq from durable.detached x where x.owner = i_old order by x.id, x.seq for update);
    delete from durable.lease l where l.owner = i_old;
end
$$;
