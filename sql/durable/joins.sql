-- Children and joins. A step's children are started in its page's transaction; the parent goes on at once, or becomes a row in
-- durable.wait. The transaction that ends children adds them up in the parent's row of durable.fanout, once for all of a page; whoever
-- completes the count deletes the wait, as a timeout and a cancel may: one of them resumes the parent. Results stay where every
-- workflow's end is: durable.finished.

-- durable.is_satisfied(group): whether a parent that waits for this group goes on.
create or replace function durable.is_satisfied(i_group durable.fanout) returns boolean
language sql immutable
as $$
    select i_group.completed + i_group.failed >= i_group.total
        or coalesce(i_group.completed >= i_group.needed or i_group.failed > i_group.total - i_group.needed, false)
        or coalesce(i_group.failed > i_group.tolerance, false)
$$;

-- durable.spawn(…): children of the steps of one page, in its transaction.
--   i_parents, i_seqs, i_counts, i_cleanups, i_keeps  a line each parent: id, number of its step, how many children, what marks a
--                    cleanup; not empty: all that it ever spawned are one group
--   i_workflows, i_versions, i_steps, i_inputs, i_delays_ms, i_attributes  a line each child, parent after parent; no attributes: nothing
-- Children have their parent's priority. A parent that is cancelled spawns nothing: who cancelled it has looked for its children
-- already. Its next step meets the cancel.
-- Locks: the parents' stripes, then their groups, sorted. Tables: fanout (a row a parent), started (a row a child), attribute (a row
-- a child that has any), timers, the logs.
create or replace function durable.spawn(i_parents text, i_seqs text, i_counts text, i_cleanups text, i_workflows text, i_versions text,
    i_steps text, i_inputs text, i_delays_ms text, i_attributes text default '', i_keeps text default '') returns void
language plpgsql security definer
set search_path = pg_catalog, durable, pg_temp
as $$
declare
    v_ids uuid[] := string_to_array(i_parents, E'\n');
    v_seqs int[] := string_to_array(i_seqs, E'\n');
    v_counts int[] := string_to_array(i_counts, E'\n');
    v_refused uuid[];
    v_groups durable.fanout[];
    v_now timestamptz := durable.now();
    v_today int := floor(extract(epoch from v_now) / 86400);
    v_at_once_ids uuid[];
    v_at_once_lines text[];
    v_later_ids uuid[];
    v_later_lines text[];
    v_later_ms float8[];
begin
    perform durable.lock_stripes(v_ids);
    v_refused := array(
        select q.id from rows from (unnest(v_ids), string_to_table(i_cleanups, E'\n')) q(id, cleanup)
        where coalesce(q.cleanup, '') = '' and exists (select from durable.cancelled c where c.id = q.id));
    with parents as (
        -- The same step twice can only have been put into the log by hand: that must not stop its page.
        select p.id, min(p.seq) as seq, sum(p.n)::int as n, coalesce(max(p.keeps), '') <> '' as keeps
        from rows from (unnest(v_ids), unnest(v_seqs), unnest(v_counts), string_to_table(i_keeps, E'\n')) p(id, seq, n, keeps)
        where p.id <> all (v_refused) group by p.id order by p.id
    ), groups as (
        insert into durable.fanout as f (id, day, seq, total, keeps) select p.id, v_today, p.seq, p.n, p.keeps from parents p
        on conflict (id) do update set
            day = case when f.wait_seq is null or f.keeps then f.day else excluded.day end,
            seq = case when f.wait_seq is null or f.keeps then f.seq else excluded.seq end,
            total = case when f.wait_seq is null or f.keeps then f.total else 0 end + excluded.total,
            completed = case when f.wait_seq is null or f.keeps then f.completed else 0 end,
            failed = case when f.wait_seq is null or f.keeps then f.failed else 0 end,
            wait_seq = null
        returning f.*
    )
    select array_agg(g::durable.fanout) into v_groups from groups g;
    with children as materialized (
        select durable.new_id(v_now) as id, p.id as parent, g.seq as parent_seq,
            g.total - count(*) over (partition by p.id) + row_number() over (partition by p.id order by c.o) - 1 as number,
            c.workflow, c.version, c.step, c.input, c.delay_ms, c.attributes
        from (select q.id, q.n, sum(q.n) over (order by q.o) - q.n as first
              from unnest(v_ids, v_counts) with ordinality q(id, n, o)) p
        join unnest(v_groups) g on g.id = p.id
        cross join lateral generate_series(p.first + 1, p.first + p.n) place
        join (select q.workflow, q.version::int, q.step, q.input, q.delay_ms::float8, nullif(q.attributes, '')::jsonb as attributes, q.o
              from rows from (string_to_table(i_workflows, E'\n'), string_to_table(i_versions, E'\n'), string_to_table(i_steps, E'\n'),
                  string_to_table(i_inputs, E'\n'), string_to_table(i_delays_ms, E'\n'), string_to_table(i_attributes, E'\n'))
                  with ordinality q(workflow, version, step, input, delay_ms, attributes, o)) c on c.o = place
    ), begun as (
        insert into durable.started (id, day, workflow, version, input, at, parent, parent_seq, number)
        select c.id, durable.day_of(c.id), c.workflow, c.version, c.input, v_now, c.parent, c.parent_seq, c.number from children c
    ), found_by as (
        insert into durable.attribute (id, attributes)
        select c.id, jsonb_strip_nulls(c.attributes) from children c where jsonb_strip_nulls(c.attributes) <> '{}'
    ), lines as (
        select c.id, durable.line(c.id, 1, c.workflow, c.step, c.version, c.input) as line, c.delay_ms from children c
    )
    select array_agg(l.id) filter (where l.delay_ms = 0), array_agg(l.line) filter (where l.delay_ms = 0),
        array_agg(l.id) filter (where l.delay_ms > 0), array_agg(l.line) filter (where l.delay_ms > 0),
        array_agg(l.delay_ms) filter (where l.delay_ms > 0)
    into v_at_once_ids, v_at_once_lines, v_later_ids, v_later_lines, v_later_ms
    from lines l;
    insert into durable.priority (id, weight)
    select s.id, p.weight from unnest(v_at_once_ids || v_later_ids) i join durable.started s on s.id = i and s.day = v_today
    join durable.priority p on p.id = s.parent
    where exists (select from durable.priority q where q.id = any (v_ids));
    if (select c.audit from durable.cluster c) then
        perform durable.record('spawn', array_agg(s.id), null,
            array_agg(jsonb_build_object('workflow', s.workflow, 'parent', durable.short(s.parent))))
        from durable.started s
        where (s.id, s.day) in (select i, durable.day_of(i) from unnest(v_at_once_ids || v_later_ids) i);
    end if;
    perform durable.append_lines(v_at_once_ids, v_at_once_lines);
    if v_later_ids is not null then
        perform durable.set_timers(v_later_ids, array_fill(1, array[cardinality(v_later_ids)]), v_later_lines, v_later_ms);
    end if;
end
$$;

-- durable.await_children(…): parents of one page that wait for their children from now on, in its transaction, one of each a line.
--   i_ids, i_seqs    the parent, and the number of its next step
--   i_lines          that step; i_timeout_lines: the step when the delay in milliseconds is over; no delay: nothing
--   i_needed, i_tolerances, i_cancels_rest  see durable.fanout; nothing: null, null, false
--   i_cleanups       what marks a cleanup
--   i_names, i_tokens  signals that resume it too, as in durable.await_signals; nothing: none
-- A cancelled parent does not wait, nor does one whose children have ended, or for which a signal is there already.
-- Tables: fanout, wait (a row each), mailbox, used_token, timers, the logs, audit.
create or replace function durable.await_children(i_ids text, i_seqs text, i_lines text, i_timeout_lines text, i_delays_ms text,
    i_needed text, i_tolerances text, i_cancels_rest text, i_cleanups text, i_names text default '', i_tokens text default '')
    returns void
language plpgsql security definer
set search_path = pg_catalog, durable, pg_temp
as $$
declare
    v_ids uuid[] := string_to_array(i_ids, E'\n');
    v_now timestamptz := durable.timer_now();
    v_going_on uuid[];
    v_lines text[];
    v_new record;
    v_mail durable.mailbox;
    v_resumed uuid[] := '{}';
    v_resumed_by jsonb[] := '{}';
    v_timed_ids uuid[];
    v_timed_seqs int[];
    v_delays_ms float8[];
begin
    perform durable.lock_stripes(v_ids);
    select coalesce(array_agg(q.id), '{}'), coalesce(array_agg(q.line), '{}') into v_going_on, v_lines
    from rows from (unnest(v_ids), string_to_table(i_lines, E'\n'), string_to_table(i_cleanups, E'\n')) q(id, line, cleanup)
    where coalesce(q.cleanup, '') = '' and exists (select from durable.cancelled c where c.id = q.id);
    for v_new in
        select q.id, q.line, string_to_array(q.names, ',') as names, nullif(q.token, '')::int as token_seq
        from rows from (unnest(v_ids), string_to_table(i_lines, E'\n'), string_to_table(i_names, E'\n'), string_to_table(i_tokens, E'\n'))
            q(id, line, names, token)
        where q.names <> '' and q.id <> all (v_going_on)
        order by q.id
    loop
        v_mail := durable.take_mail(v_new.id, v_new.names, v_new.token_seq);
        if v_mail.id is not null then
            v_going_on := v_going_on || v_new.id;
            v_lines := v_lines || durable.with_event(v_new.line, v_mail.event);
            v_resumed := v_resumed || v_new.id;
            v_resumed_by := v_resumed_by || jsonb_build_object('signal', v_mail.name);
        end if;
    end loop;
    insert into durable.fanout (id, day, seq, total)
    select distinct q.id, durable.today(), 0, 0 from unnest(v_ids) q(id) where q.id <> all (v_going_on) order by 1
    on conflict do nothing;
    perform durable.lock_groups(v_ids);
    with waits as (
        select distinct on (q.id) q.id, q.seq::int, q.line, q.timeout_line, nullif(q.delay_ms, '')::float8 as delay_ms,
            nullif(q.needed, '')::int as needed, nullif(q.tolerance, '')::int as tolerance, coalesce(q.cancels_rest, '') <> '' as cancels_rest,
            coalesce(string_to_array(q.names, ','), '{}') as names, nullif(q.token, '')::int as token_seq
        from rows from (unnest(v_ids), string_to_table(i_seqs, E'\n'), string_to_table(i_lines, E'\n'),
            string_to_table(i_timeout_lines, E'\n'), string_to_table(i_delays_ms, E'\n'), string_to_table(i_needed, E'\n'),
            string_to_table(i_tolerances, E'\n'), string_to_table(i_cancels_rest, E'\n'), string_to_table(i_names, E'\n'),
            string_to_table(i_tokens, E'\n'))
            q(id, seq, line, timeout_line, delay_ms, needed, tolerance, cancels_rest, names, token)
        where q.id <> all (v_going_on)
    ), groups as (
        update durable.fanout f
        set wait_seq = w.seq, needed = w.needed, tolerance = w.tolerance, cancels_rest = w.cancels_rest
        from waits w where f.id = w.id
    ), rows as (
        insert into durable.wait (id, seq, line, due, since, names, signal_line, token_seq)
        select w.id, w.seq, w.timeout_line, coalesce(v_now + make_interval(secs => w.delay_ms / 1000), 'infinity'), durable.now(), w.names,
            nullif(w.line, w.timeout_line), w.token_seq
        from waits w
        on conflict do nothing
    )
    select array_agg(w.id), array_agg(w.seq), array_agg(w.delay_ms) into v_timed_ids, v_timed_seqs, v_delays_ms
    from waits w where w.delay_ms is not null;
    perform durable.append_lines(v_going_on, v_lines);
    perform durable.record('resume', v_resumed, null, v_resumed_by);
    if v_timed_ids is not null then
        perform durable.set_timers(v_timed_ids, v_timed_seqs, array_fill(null::text, array[cardinality(v_timed_ids)]), v_delays_ms);
    end if;
    perform durable.resume_parents(v_ids);
end
$$;

-- durable.parents_of(ids, statuses): the groups that these workflows are children of, and how many of each completed and did not.
-- Hazard: never by reading whole tables, whatever the planner knew of them when a session first asked.
create or replace function durable.parents_of(i_ids uuid[], i_statuses text[] default null)
returns table (parent uuid, parent_seq int, completed int, failed int)
language plpgsql stable
set search_path = pg_catalog, durable, pg_temp
set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off
as $$
begin
    return query
        select s.parent, s.parent_seq, count(*) filter (where q.status = 'completed')::int, count(*) filter (where q.status <> 'completed')::int
        from unnest(i_ids, i_statuses) q(id, status)
        cross join lateral (
            select c.parent, c.parent_seq from durable.started c
            where c.id = q.id and c.day = durable.day_of(q.id) and c.parent is not null
            offset 0) s
        group by s.parent, s.parent_seq;
end
$$;

-- durable.lock_groups(parents): their groups until the transaction ends, in one order.
create or replace function durable.lock_groups(i_parents uuid[]) returns void
language sql volatile
set search_path = pg_catalog, durable, pg_temp
as $$
    select count(*) from (select from durable.fanout f where f.id = any (i_parents) order by f.id for update) f
$$;

-- durable.lock_groups(ids, ended): before a page's first lock on a group or a wait: the groups of these parents, and of the parents
-- of what ends in the same transaction.
create or replace function durable.lock_groups(i_ids text, i_ended text) returns void
language plpgsql security definer
set search_path = pg_catalog, durable, pg_temp
as $$
begin
    if exists (select from durable.fanout) then
        perform durable.lock_groups(string_to_array(i_ids, E'\n')::uuid[]
            || array(select p.parent from durable.parents_of(string_to_array(i_ended, E'\n')::uuid[]) p));
    end if;
end
$$;

-- durable.end_children(ids, statuses): these workflows have ended in this transaction; parents whose count that completes go on.
-- Locks: the groups of their parents, sorted, then the waits. Tables: fanout (a row a parent), wait (a row deleted), the logs.
-- Hazard: counted under the group's lock: two transactions that each end one of the last two would otherwise each see one missing.
create or replace function durable.end_children(i_ids uuid[], i_statuses text[]) returns void
language plpgsql
set search_path = pg_catalog, durable, pg_temp
as $$
declare
    v_parents uuid[];
    v_seqs int[];
    v_completed int[];
    v_failed int[];
begin
    select array_agg(p.parent), array_agg(p.parent_seq), array_agg(p.completed), array_agg(p.failed)
    into v_parents, v_seqs, v_completed, v_failed
    from durable.parents_of(i_ids, i_statuses) p;
    if v_parents is null then
        return;
    end if;
    perform durable.lock_groups(v_parents);
    update durable.fanout f set completed = f.completed + e.completed, failed = f.failed + e.failed
    from unnest(v_parents, v_seqs, v_completed, v_failed) e(parent, parent_seq, completed, failed)
    where f.id = e.parent and f.seq = e.parent_seq;
    perform durable.resume_parents(v_parents);
end
$$;

-- durable.resume_parents(ids): of these parents, whose groups this transaction has locked, those that wait and need wait no longer.
create or replace function durable.resume_parents(i_ids uuid[]) returns void
language plpgsql
set search_path = pg_catalog, durable, pg_temp
as $$
declare
    v_ids uuid[];
    v_lines text[];
    v_cancelling uuid[];
begin
    with held as materialized (
        select w.id, w.seq, g.cancels_rest
        from (select f.id, f.wait_seq, f.cancels_rest from durable.fanout f where f.id = any (i_ids) and durable.is_satisfied(f)
              order by f.id offset 0) g
        cross join lateral (select w.id, w.seq from durable.wait w where w.id = g.id and w.seq = g.wait_seq for update) w
    ), resumed as (
        delete from durable.wait w using held h where w.id = h.id and w.seq = h.seq
        returning w.id, coalesce(w.signal_line, w.line) as line, h.cancels_rest
    )
    select array_agg(r.id), array_agg(r.line), array_agg(r.id) filter (where r.cancels_rest) into v_ids, v_lines, v_cancelling
    from resumed r;
    perform durable.append_lines(v_ids, v_lines);
    perform durable.record('resume', v_ids, null, array(select '{"children": true}'::jsonb from unnest(v_ids)));
    if v_cancelling is not null then
        perform durable.cancel_lines(array_agg(s.id), 'its siblings were enough', null)
        from durable.fanout f join durable.started s on s.parent = f.id and s.parent_seq = f.seq
        where f.id = any (v_cancelling) and not exists (select from durable.finished e where e.id = s.id and e.day = s.day);
    end if;
end
$$;

-- durable.children_of(parents, first, limit): of the last group of each of these workflows (a line each), so many children from that
-- number on: whole ids, for who holds the parent's.
-- status: running, stuck, completed, failed or cancelled; output: of those that have ended, as durable.finished has it.
create or replace function durable.children_of(i_parents text, i_first int default 0, i_limit int default 1000)
returns table (parent uuid, number int, id uuid, workflow text, status text, output text)
language plpgsql stable security definer
set search_path = pg_catalog, durable, pg_temp
set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off
as $$
declare
    v_today int := durable.today();
begin
    return query
        select g.id, s.number, s.id, s.workflow,
            coalesce(f.status, case when exists (select from durable.dead_letter d where d.id = s.id) then 'stuck' else 'running' end), f.output
        from durable.fanout g
        cross join lateral (
            select c.id, c.day, c.number, c.workflow from durable.started c
            where c.parent = g.id and c.parent_seq = g.seq and c.day between g.day and v_today
                and c.number >= i_first and c.number < i_first + i_limit
            offset 0) s
        left join durable.finished f on f.id = s.id and f.day = s.day
        where g.id = any (string_to_array(i_parents, E'\n')::uuid[])
        order by 1, 2;
end
$$;

-- durable.group_of(parent): how many children the last group has, and how many of them have ended which way; a row, or none.
create or replace function durable.group_of(i_parent uuid) returns table (total int, completed int, failed int)
language sql stable security definer
set search_path = pg_catalog, durable, pg_temp
as $$ select f.total, f.completed, f.failed from durable.fanout f where f.id = i_parent $$;

-- durable.is_awaited(id): whether it is of the last group of a live parent, which may still read how it ended.
create or replace function durable.is_awaited(i_id uuid) returns boolean
language sql stable
set search_path = pg_catalog, durable, pg_temp
as $$
    select exists (
        select from durable.started s join durable.fanout f on f.id = s.parent and f.seq = s.parent_seq
        where s.id = i_id and s.day = durable.day_of(i_id) and durable.is_live(f.id))
$$;
