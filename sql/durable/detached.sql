-- A step that outlasts its page becomes a row: its batch is finished without it. Whoever completes it deletes the row, in the
-- transaction that hands the workflow on; no row means that somebody else was given the step, and the result is dropped.
-- A row without an owner (0) may be taken by any process: what exceeded a limit, what a drain handed back, what the dead left.

-- durable.detach(shard, owners, keys, lines, crashes): rows for steps of one page, in the page's transaction. One a line: the process
-- that runs it or 0, id and step number with a colon, the envelope, crashes so far. Renews the lease of the owners.
create or replace function durable.detach(i_shard int, i_owners text, i_keys text, i_lines text, i_crashes text) returns void
language plpgsql security definer
set search_path = pg_catalog, durable, pg_temp
as $$
declare
    v_now timestamptz := durable.now();
begin
    insert into durable.lease as l (owner, active)
    select distinct o::bigint, v_now from string_to_table(i_owners, E'\n') o where o <> '0'
    on conflict (owner) do update set active = excluded.active where l.active < excluded.active - interval '1 second';
    insert into durable.detached (id, seq, shard, owner, line, crashes, since)
    select split_part(q.key, ':', 1)::uuid, split_part(q.key, ':', 2)::int, i_shard, q.owner::bigint, q.line, q.crashes::int, v_now
    from rows from (string_to_table(i_owners, E'\n'), string_to_table(i_keys, E'\n'), string_to_table(i_lines, E'\n'),
        string_to_table(i_crashes, E'\n')) q(owner, key, line, crashes)
    -- A line that somebody put into the log by hand must not stop the page.
    where q.key ~ '^[0-9a-f]{32}:[0-9]{1,9}$'
    on conflict do nothing;
    if i_owners ~ '(^|\n)0(\n|$)' then
        perform durable.wake_all();
    end if;
end
$$;

-- durable.complete_detached(owner, keys): deletes the rows of steps that this process has run, in the transaction that hands their
-- workflows on. i_keys: id and step number with a colon, one a line. Result: those that were still its own, in the same form.
create or replace function durable.complete_detached(i_owner bigint, i_keys text) returns text
language plpgsql security definer
set search_path = pg_catalog, durable, pg_temp
as $$
declare
    v_mine text;
begin
    -- In one order, so that two processes that are asked about the same rows wait for each other; and in an earlier statement than
    -- the delete, because the rows that a statement has locked it may not find again.
    perform 1 from durable.detached d
    where (d.id, d.seq) in (select split_part(k, ':', 1)::uuid, split_part(k, ':', 2)::int from string_to_table(i_keys, E'\n') k
                           where k ~ '^[0-9a-f]{32}:[0-9]{1,9}$')
    order by d.id, d.seq for update;
    with gone as (
        delete from durable.detached d
        where (d.id, d.seq) in (select split_part(k, ':', 1)::uuid, split_part(k, ':', 2)::int from string_to_table(i_keys, E'\n') k
                           where k ~ '^[0-9a-f]{32}:[0-9]{1,9}$')
            and d.owner = i_owner
        returning durable.hex(d.id) || ':' || d.seq as key)
    select coalesce(string_agg(g.key, E'\n'), '') into v_mine from gone g;
    return v_mine;
end
$$;

-- durable.take_detached(owner, n, with_suspect): gives up to n rows that nobody runs to this process, oldest first. A suspect, whose
-- process died before, comes only alone: one, and only if asked for; is_alone is committed before it runs.
create or replace function durable.take_detached(i_owner bigint, i_n int, i_with_suspect boolean)
returns table (shard int, line text, crashes int, progress text)
language plpgsql security definer
set search_path = pg_catalog, durable, pg_temp
as $$
#variable_conflict use_column
begin
    if not durable.has_queued(i_with_suspect) then
        return;
    end if;
    insert into durable.lease as l (owner, active) values (i_owner, durable.now())
    on conflict (owner) do update set active = excluded.active where l.active < excluded.active - interval '1 second';
    return query
        with free as (
            select d.id, d.seq from durable.detached d where d.owner = 0 and d.crashes = 0
            order by d.since limit i_n for update skip locked),
        suspect as (
            select d.id, d.seq from durable.detached d where i_with_suspect and d.owner = 0 and d.crashes > 0
            order by d.since limit 1 for update skip locked)
        update durable.detached d set owner = i_owner, is_alone = d.crashes > 0
        from (select * from free union all select * from suspect) f where d.id = f.id and d.seq = f.seq
        returning d.shard, d.line, d.crashes, d.progress;
end
$$;

-- durable.has_queued(with_suspect): whether there is a row to take. Reads only.
create or replace function durable.has_queued(i_with_suspect boolean) returns boolean
language sql stable security definer
set search_path = pg_catalog, durable, pg_temp
as $$ select exists (select from durable.detached d where d.owner = 0 and (i_with_suspect or d.crashes = 0)) $$;

-- durable.report_progress(owner, keys, progress): what ctx.heartbeat said, for the next attempt. Result: the keys that are no longer
-- this process's: their steps run for nothing.
create or replace function durable.report_progress(i_owner bigint, i_keys text, i_progress text) returns text
language sql security definer
set search_path = pg_catalog, durable, pg_temp
as $$
    with said as (
        select k.key, split_part(k.key, ':', 1)::uuid as id, split_part(k.key, ':', 2)::int as seq, k.progress
        from rows from (string_to_table(i_keys, E'\n'), string_to_table(i_progress, E'\n')) k(key, progress)),
    kept as (
        update durable.detached d set progress = s.progress from said s
        where d.id = s.id and d.seq = s.seq and d.owner = i_owner returning s.key)
    select coalesce(string_agg(s.key, E'\n'), '') from said s where s.key not in (select k.key from kept k)
$$;

-- durable.single_out(owner, key): this step hangs; the process is about to end because of it, and of no other.
create or replace function durable.single_out(i_owner bigint, i_key text) returns void
language sql security definer
set search_path = pg_catalog, durable, pg_temp
as $$
    update durable.detached d set is_alone = true
    where d.id = split_part(i_key, ':', 1)::uuid and d.seq = split_part(i_key, ':', 2)::int and d.owner = i_owner
$$;

-- durable.disown(owner, keys): after a lost connection: rows of this process that it does not run, whose commit it never heard of,
-- may be taken by others. i_keys: what it does run. How many there were.
create or replace function durable.disown(i_owner bigint, i_keys text) returns int
language plpgsql security definer
set search_path = pg_catalog, durable, pg_temp
as $$
declare
    v_rows int;
begin
    -- The lost connection may still be taking steps: that holds the lease, and only after it is all there to be seen.
    insert into durable.lease as l (owner, active) values (i_owner, durable.now())
    on conflict (owner) do update set active = excluded.active;
    update durable.detached d set owner = 0, is_alone = false
    where d.owner = i_owner and durable.hex(d.id) || ':' || d.seq <> all (string_to_array(i_keys, E'\n'));
    get diagnostics v_rows = row_count;
    return v_rows;
end
$$;

-- durable.hand_back(owner, is_at_fault): the steps of a process that is gone, or goes, may be taken by others. If the process may have
-- died of one of them, the one that ran alone has crashed once more; if none did, all are suspects.
create or replace function durable.hand_back(i_owner bigint, i_is_at_fault boolean) returns int
language plpgsql
set search_path = pg_catalog, durable, pg_temp
as $$
declare
    v_is_one_alone boolean := exists (select from durable.detached d where d.owner = i_owner and d.is_alone);
    v_rows int;
begin
    -- First, in a statement of its own: a process that died while it was taking steps still holds its lease until they are its own.
    delete from durable.lease l where l.owner = i_owner;
    update durable.detached d
    set owner = 0, is_alone = false,
        crashes = d.crashes + (i_is_at_fault and (d.is_alone or not v_is_one_alone))::int
    where (d.id, d.seq) in (select x.id, x.seq from durable.detached x where x.owner = i_owner order by x.id, x.seq for update);
    get diagnostics v_rows = row_count;
    if v_rows > 0 then
        perform durable.wake_all();
    end if;
    return v_rows;
end
$$;

-- durable.has_silent_lease(dead): whether a process that runs detached steps has not been heard of for so long. Reads only.
create or replace function durable.has_silent_lease(i_dead interval) returns boolean
language sql stable security definer
set search_path = pg_catalog, durable, pg_temp
as $$
    select exists (select from durable.lease l where l.active < durable.now() - i_dead
                   and exists (select from durable.detached d where d.owner = l.owner))
$$;

-- durable.requeue_silent(dead): the steps of one such process may be taken by others. Silence makes nobody a suspect.
create or replace function durable.requeue_silent(i_dead interval) returns int
language plpgsql
set search_path = pg_catalog, durable, pg_temp
as $$
declare
    v_owner bigint;
begin
    select l.owner into v_owner from durable.lease l
    where l.active < durable.now() - i_dead and exists (select from durable.detached d where d.owner = l.owner)
    order by l.active limit 1 for update skip locked;
    return case when found then durable.hand_back(v_owner, false) else 0 end;
end
$$;
