-- durable.has_events(queue_id): whether something was committed since the newest tick. Reads only: an idle consumer's probe.
-- What this statement sees and the tick's snapshot did not is either past its xmax or among those in progress then.
create or replace function durable.has_events(i_queue_id int) returns boolean
language plpgsql stable
set search_path = pg_catalog, durable, pg_temp
as $$
declare
    v_snapshot pg_snapshot;
    v_running xid8[];
    v_table text;
    v_found boolean;
begin
    select t.tick_snapshot into v_snapshot from pgque.tick t where t.tick_queue = i_queue_id order by t.tick_id desc limit 1;
    v_running := array(select pg_snapshot_xip(v_snapshot));
    foreach v_table in array pgque.event_tables(i_queue_id, v_snapshot) loop
        execute 'select true from ' || v_table || ' where ev_txid >= $1 limit 1' into v_found using pg_snapshot_xmax(v_snapshot);
        if v_found is null and v_running <> '{}' then
            execute 'select true from ' || v_table || ' where ev_txid = any ($1) limit 1' into v_found using v_running;
        end if;
        if v_found then
            return true;
        end if;
    end loop;
    return false;
end
$$;

-- durable.probe(shard, dead): whether a claim would find work, which it does not on a paused shard; with an interval, a window silent for longer counts, which costs
-- a walk over the window rows. No lock, no write, no transaction id.
create or replace function durable.probe(i_shard int, i_dead interval default null) returns boolean
language plpgsql stable security definer
set search_path = pg_catalog, durable, pg_temp
as $$
declare
    v_queue_id int := (select s.queue_id from durable.shard s where s.shard = i_shard and not s.is_paused);
begin
    if v_queue_id is null then
        return false;
    end if;
    if i_dead is not null and exists (
        select 1 from durable.win w where w.shard = i_shard and w.active < durable.now() - i_dead)
    then
        return true;
    end if;
    return durable.has_events(v_queue_id);
end
$$;

-- durable.look(shards, dead, may_take, with_suspect): whether there is anything to do for a consumer of these shards, and in how many
-- seconds the next timer is due (null: no timer waits). One round trip; reads only.
--   i_may_take  the consumer has room for detached steps that nobody runs; i_with_suspect: also for one that runs alone
create or replace function durable.look(i_shards int[], i_dead interval, i_may_take boolean, i_with_suspect boolean,
    out has_work boolean, out due_s float8)
language plpgsql stable security definer
set search_path = pg_catalog, durable, pg_temp
as $$
declare
    v_shard int;
begin
    due_s := durable.next_due();
    foreach v_shard in array i_shards loop
        if durable.probe(v_shard, i_dead) then
            has_work := true;
            return;
        end if;
    end loop;
    has_work := (i_may_take and durable.has_queued(i_with_suspect)) or (i_dead is not null and durable.has_silent_lease(i_dead));
end
$$;

-- durable.rescue(shard, owner, lines, bytes, dead): what silent processes left: their detached steps are free for all; the page of a
-- window of the shard that was taken over, or null. Also asked while the caller has a window open: it does not tick.
create or replace function durable.rescue(i_shard int, i_owner bigint, i_lines int, i_bytes int, i_dead interval) returns text
language plpgsql security definer
set search_path = pg_catalog, durable, pg_temp
as $$
declare
    v_silent bigint;
begin
    if durable.has_silent_lease(i_dead) then
        perform durable.requeue_silent(i_dead);
    end if;
    if exists (select from durable.shard s where s.shard = i_shard and s.is_paused) then
        return null;
    end if;
    v_silent := durable.take_over(i_shard, i_owner, i_dead);
    return case when v_silent is not null then durable.page(v_silent, i_owner, i_lines, i_bytes) end;
end
$$;

-- durable.claim(…): the first page of an open or a new window of the shard, for one consumer; null when there is nothing, or it is paused.
--   i_member   the consumer's name as the engine's subconsumer (registered before; see durable.join_shard)
--   i_owner    64 random bits of this process incarnation: the fence's other half
--   i_dead     with an interval, windows silent for longer are taken over first (a walk over the window rows: now and then)
--   i_expected the caller has just appended here: the look is spared, at the price of an empty window if a sibling was faster
-- Locks, in this order: the shard's row; a silent window's row (skipped when a page commit holds it); the engine's own.
-- Nothing is appended after the tick's snapshot. Tables: win (one row), tick and batch in the engine.
create or replace function durable.claim(i_shard int, i_member text, i_owner bigint, i_lines int, i_bytes int, i_dead interval default null,
    i_expected boolean default false)
returns text
language plpgsql security definer
set search_path = pg_catalog, durable, pg_temp
as $$
declare
    v_queue text;
    v_queue_id int;
    v_is_paused boolean;
    v_batch record;
    v_rescued text;
    v_owner bigint;
begin
    perform durable.demand_read_committed();
    -- A claim that a server crash forgets was never more than a claim; the page's own commit is durable.
    perform set_config('synchronous_commit', 'off', true);
    select s.queue, s.queue_id, s.is_paused into v_queue, v_queue_id, v_is_paused from durable.shard s where s.shard = i_shard for update;
    if not found then
        raise exception 'shard % does not exist; this database has shards 0 to %', i_shard,
            (select max(s.shard) from durable.shard s) using errcode = 'DC004';
    end if;

    if i_dead is not null then
        v_rescued := durable.rescue(i_shard, i_owner, i_lines, i_bytes, i_dead);
        if v_rescued is not null then
            return v_rescued;
        end if;
    end if;
    if v_is_paused then
        return null;
    end if;

    if i_expected or durable.has_events(v_queue_id) then
        -- A later statement than the lock: two ticks taken from one stale snapshot would deliver their events twice.
        perform pgque.ticker(v_queue, t.tick_id + 1, clock_timestamp(), t.tick_event_seq)
        from (select k.tick_id, k.tick_event_seq from pgque.tick k where k.tick_queue = v_queue_id
              order by k.tick_id desc limit 1) t;
    end if;
    v_batch := pgque.next_batch_custom(v_queue, durable.consumer_of(i_shard), i_member, null, null, null, null);
    if v_batch.batch_id is null then
        return null;
    end if;
    select w.owner into v_owner from durable.win w where w.batch = v_batch.batch_id;
    if not found then
        insert into durable.win (batch, shard, owner, s0, s1, active)
        select v_batch.batch_id, i_shard, i_owner, p.tick_snapshot, n.tick_snapshot, durable.now()
        from pgque.tick p, pgque.tick n
        where p.tick_queue = v_queue_id and p.tick_id = v_batch.prev_tick_id
            and n.tick_queue = v_queue_id and n.tick_id = v_batch.next_tick_id;
    elsif v_owner <> i_owner then
        -- This member's window was taken over and is still open: the process must come back under a new name.
        perform durable.lost(v_batch.batch_id);
    end if;
    return durable.page(v_batch.batch_id, i_owner, i_lines, i_bytes);
end
$$;

-- durable.join_shard(shard, member), durable.leave_shard(shard, member): registration, outside the path (it locks names globally).
create or replace function durable.join_shard(i_shard int, i_member text) returns void
language sql security definer
set search_path = pg_catalog, durable, pg_temp
as $$ select pgque.register_subconsumer(durable.queue_of(i_shard), durable.consumer_of(i_shard), i_member, true) $$;

create or replace function durable.leave_shard(i_shard int, i_member text) returns void
language sql security definer
set search_path = pg_catalog, durable, pg_temp
as $$ select pgque.unregister_subconsumer(durable.queue_of(i_shard), durable.consumer_of(i_shard), i_member) $$;

-- durable.fall_asleep(shards), durable.wake_up(shards): the mark that makes appenders notify: a lock of the session, which ends with it
-- and leaves no dead row. Result: the shards that this session marks now; not those of a sibling: ask again later.
create or replace function durable.fall_asleep(i_shards int[]) returns setof int
language sql volatile
as $$ select s from unnest(i_shards) s where pg_try_advisory_lock(1685418860, s) $$;

create or replace function durable.wake_up(i_shards int[]) returns void
language sql volatile
as $$ select pg_advisory_unlock(1685418860, s) from unnest(i_shards) s $$;

-- durable.is_asleep(shard): whether a consumer of the shard sleeps in another session. One expression, so that nothing comes between
-- its two locks. The lock is not kept: transactions that append would keep everybody awake for as long as they are open.
create or replace function durable.is_asleep(i_shard int) returns boolean
language sql volatile
as $$
    select case when pg_try_advisory_lock_shared(1685418860, i_shard) then not pg_advisory_unlock_shared(1685418860, i_shard) else true end
$$;

-- durable.wake_all(): notifies whoever sleeps, of what any process may take.
create or replace function durable.wake_all() returns void
language sql volatile security definer
set search_path = pg_catalog, durable, pg_temp
as $$ select pg_notify(s.queue, '') from durable.shard s where durable.is_asleep(s.shard) $$;
