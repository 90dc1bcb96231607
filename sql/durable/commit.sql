-- durable.fence(batch, owner, done): phase 2's first statement. Locks the window's row if it still is this owner's, with the
-- cursor where this page began; else DC001. It leaves a mark that ends with the transaction: a commit by a step's own
-- code takes the mark away, and durable.commit_page refuses.
-- Asked with for update: a plain read of "is it mine?" beside a commit in flight gave two sets of successors.
create or replace function durable.fence(i_batch bigint, i_owner bigint, i_done durable.cursor) returns void
language plpgsql security definer
set search_path = pg_catalog, durable, pg_temp
as $$
begin
    perform durable.demand_read_committed();
    perform 1 from durable.win w where w.batch = i_batch and w.owner = i_owner and w.done = i_done for update;
    if not found then
        perform durable.lost(i_batch);
    end if;
    perform set_config('durable.fenced', i_batch || ' ' || i_owner || ' ' || i_done::text, true);
end
$$;

-- durable.finish(ids, statuses, outputs, memos): terminal records. The first end of a workflow stands. Tables: finished (a row each),
-- cancelled and priority (a row deleted), what a permit given back and a child's end change (durable.give_back, durable.end_children).
create or replace function durable.finish(i_ids uuid[], i_statuses text[], i_outputs text[], i_memos text[] default null) returns void
language plpgsql
set search_path = pg_catalog, durable, pg_temp
as $$
declare
    v_ids uuid[];
    v_statuses text[];
begin
    with ended as (
        insert into durable.finished (id, day, status, output, at, memo)
        select q.id, durable.day_of(q.id), q.status, q.output, durable.now(), q.memo
        from unnest(i_ids, i_statuses, i_outputs, i_memos) q(id, status, output, memo)
        on conflict do nothing
        returning id, status
    )
    select array_agg(e.id), array_agg(e.status) into v_ids, v_statuses from ended e;
    if exists (select from durable.cancelled) then
        delete from durable.cancelled c where c.id = any (v_ids);
    end if;
    if exists (select from durable.priority) then
        delete from durable.priority p where p.id = any (v_ids);
    end if;
    if exists (select from durable.permit) then
        perform durable.give_back(v_ids, null);
    end if;
    if exists (select from durable.fanout) then
        perform durable.end_children(v_ids, v_statuses);
    end if;
end
$$;

-- durable.hand_on(…): successors and terminal records, in a transaction that holds the right to them (see commit_page's arguments).
create or replace function durable.hand_on(i_shard int, i_steps text, i_counts int[], i_ids text, i_statuses text, i_outputs text,
    i_memos text default null, i_spilled text default null) returns void
language plpgsql security definer
set search_path = pg_catalog, durable, pg_temp
as $$
begin
    if cardinality(i_counts) = 1 then
        perform durable.append(i_shard, i_steps, i_counts[1]);
    else
        perform durable.append(i_shard, c.lines, i_counts[c.n])
        from string_to_table(i_steps, E'\f') with ordinality c(lines, n) where cardinality(i_counts) > 1;
    end if;
    if i_ids ~ '^([0-9a-f]{32}\n?)*$' then
        perform durable.finish(string_to_array(i_ids, E'\n')::uuid[], string_to_array(i_statuses, E'\n'), string_to_array(i_outputs, E'\n'),
            string_to_array(i_memos, E'\n', ''));
    elsif i_ids is not null then
        -- A line that somebody put into the log by hand must not stop the page.
        perform durable.finish(array_agg(q.id::uuid), array_agg(q.status), array_agg(q.output), array_agg(q.memo))
        from rows from (string_to_table(i_ids, E'\n'), string_to_table(i_statuses, E'\n'), string_to_table(i_outputs, E'\n'),
            string_to_table(i_memos, E'\n', '')) q(id, status, output, memo)
        where q.id ~ '^[0-9a-f]{32}$';
    end if;
    if i_spilled is not null then
        perform durable.put_chunks(i_spilled);
    end if;
end
$$;

-- durable.commit_page(…): all that a page did, after durable.fence in the same transaction.
--   i_done, i_next   the cursor where the page began, and where it ends
--   i_is_last        whether the window ends with this page: then the engine's batch is finished, and must answer 1
--   i_steps, i_counts  successors: JSON lines, a form feed between log entries, and how many lines each entry has.
--     One text, because an array's elements are quoted and unquoted by regular expressions on the way.
--   i_ids, i_statuses, i_outputs  terminal records, one a line each, or null; i_memos: what each carried, or nothing; null: none of them
--   i_spilled  what the successors' memos have in durable.spill in place of carrying it (see durable.put_chunks), or null
-- A page's timers, detached steps and dead letters are written between the fence and this (durable.schedule, detach, bury).
-- Tables: the shard's log (one row a text), finished (one row a terminal record), spill (one row a chunk), win (one row changed
-- or deleted).
create or replace function durable.commit_page(
    i_shard int, i_batch bigint, i_owner bigint, i_done durable.cursor, i_next durable.cursor, i_is_last boolean,
    i_steps text, i_counts int[], i_ids text default null, i_statuses text default null, i_outputs text default null,
    i_memos text default null, i_spilled text default null) returns void
language plpgsql security definer
set search_path = pg_catalog, durable, pg_temp
as $$
begin
    if current_setting('durable.fenced', true) is distinct from i_batch || ' ' || i_owner || ' ' || i_done::text then
        raise exception 'batch %: the transaction of its page was ended by a step (commit or rollback); nothing was handed on',
            i_batch using errcode = 'DC001';
    end if;
    perform set_config('durable.fenced', '', true);
    perform durable.hand_on(i_shard, i_steps, i_counts, i_ids, i_statuses, i_outputs, i_memos, i_spilled);
    if i_is_last then
        delete from durable.win w where w.batch = i_batch;
        if pgque.finish_batch(i_batch) <> 1 then
            perform durable.lost(i_batch);
        end if;
    else
        update durable.win w
        set done = i_next, active = durable.now(), crashes = 0, suspects = greatest(w.suspects - 1, 0)
        where w.batch = i_batch;
    end if;
end
$$;

-- durable.commit_plain_page(…): fence and commit in one call, for a page without transactional steps.
create or replace function durable.commit_plain_page(
    i_shard int, i_batch bigint, i_owner bigint, i_done durable.cursor, i_next durable.cursor, i_is_last boolean,
    i_steps text, i_counts int[], i_ids text default null, i_statuses text default null, i_outputs text default null,
    i_memos text default null, i_spilled text default null) returns void
language plpgsql security definer
set search_path = pg_catalog, durable, pg_temp
as $$
begin
    perform durable.fence(i_batch, i_owner, i_done);
    perform durable.commit_page(i_shard, i_batch, i_owner, i_done, i_next, i_is_last, i_steps, i_counts, i_ids, i_statuses, i_outputs, i_memos,
        i_spilled);
end
$$;
