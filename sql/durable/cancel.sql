-- Cancel. Who cancels only appends: a line of the target's shard, which the page that meets it delivers. It leaves a row that says so
-- for as long as the workflow lives: the next page with a step of the workflow finds it and runs the cleanup in that step's place. What
-- is not in the log is fetched back into it: a wait, a long sleep, a detached step, a dead letter, what a pause holds.

-- durable.cancel_lines(ids, reason, actor): appends a cancel of each of these workflows.
create or replace function durable.cancel_lines(i_ids uuid[], i_reason text, i_actor text, i_cascade boolean default true) returns void
language sql volatile
set search_path = pg_catalog, durable, pg_temp
as $$
    select durable.append_lines(i_ids, array(
        select durable.line(i, 1, '@cancel', 'cancel', 0,
            json_build_object('reason', coalesce(i_reason, 'cancelled'), 'actor', i_actor, 'cascade', i_cascade)::text)
        from unnest(i_ids) with ordinality q(i, o) order by q.o));
    select durable.record('cancel', i_ids, i_actor,
        array(select jsonb_build_object('reason', coalesce(i_reason, 'cancelled')) from unnest(i_ids)));
$$;

-- durable.cancel(id, reason, actor, cascade): asks a workflow to end, in the caller's transaction. Whether it lived; twice is once.
--   i_cascade  its children too, and theirs
-- Errors: DC003 for an unknown id; DC002; 40001 (a snapshot older than a rotation). Tables: the shard's log (one event).
create or replace function durable.cancel(i_id uuid, i_reason text default 'cancelled', i_actor text default null,
    i_cascade boolean default true) returns boolean
language plpgsql security definer
set search_path = pg_catalog, durable, pg_temp
as $$
begin
    perform durable.checked_label('reason', i_reason, 1000), durable.checked_label('actor', i_actor, 255);
    if not exists (select from durable.started s where s.id = i_id and s.day = durable.day_of(i_id)) then
        raise exception 'no workflow with the id %…', durable.short(i_id) using errcode = 'DC003';
    end if;
    if not durable.is_live(i_id) then
        return false;
    end if;
    perform durable.cancel_lines(array[i_id], i_reason, i_actor, coalesce(i_cascade, true));
    return true;
end
$$;

-- durable.deliver_cancels(ids, reasons, actors, cascades): cancels of one page, in its transaction. One of each a line; no actor, no
-- cascade: nothing. A child that is spawned later finds its parent cancelled (durable.spawn).
-- Tables: cancelled (a row inserted), wait, detached, dead_letter, parked, queued (a row deleted), the shards' logs.
-- Hazard: a detached step that is being completed at this moment is not waited for; what it hands on meets the row in the log.
create or replace function durable.deliver_cancels(i_ids text, i_reasons text, i_actors text, i_cascades text) returns void
language plpgsql security definer
set search_path = pg_catalog, durable, pg_temp
as $$
declare
    v_cancel record;
    v_lines text[];
begin
    perform durable.lock_stripes(array(select i::uuid from string_to_table(i_ids, E'\n') i));
    for v_cancel in
        select q.id::uuid as id, q.reason, nullif(q.actor, '') as actor, coalesce(q.cascade, '') <> '' as is_cascading
        from rows from (string_to_table(i_ids, E'\n'), string_to_table(i_reasons, E'\n'), string_to_table(i_actors, E'\n'),
            string_to_table(i_cascades, E'\n')) with ordinality q(id, reason, actor, cascade, o)
        order by q.id, q.o
    loop
        continue when not durable.is_live(v_cancel.id);
        insert into durable.cancelled (id, reason, actor, at) values (v_cancel.id, v_cancel.reason, v_cancel.actor, durable.now())
        on conflict do nothing;
        continue when not found;
        with waits as (
            delete from durable.wait w where w.id = v_cancel.id returning w.line
        ), held as materialized (
            select d.id, d.seq from durable.detached d where d.id = v_cancel.id for update skip locked
        ), steps as (
            delete from durable.detached d using held h where d.id = h.id and d.seq = h.seq
            returning case when d.progress is null then d.line else left(d.line, -1) || ',"p":' || d.progress || '}' end as line
        ), letters as (
            delete from durable.dead_letter d where d.id = v_cancel.id returning d.line
        ), parked as (
            delete from durable.parked p where p.id = v_cancel.id returning p.line
        ), queued as (
            delete from durable.queued q where q.id = v_cancel.id returning q.line
        )
        select array_agg(l.line) into v_lines
        from (select * from waits union all select * from steps union all select * from letters union all select * from parked
              union all select * from queued) l(line);
        if v_lines is not null then
            perform durable.append_lines(array_fill(v_cancel.id, array[cardinality(v_lines)]), v_lines);
        end if;
        if v_cancel.is_cascading then
            perform durable.cancel_lines(array_agg(s.id), v_cancel.reason, v_cancel.actor)
            from durable.started s
            where s.parent = v_cancel.id and not exists (select from durable.finished f where f.id = s.id and f.day = s.day);
        end if;
    end loop;
end
$$;

-- durable.cancelled_in(bodies): of the workflows in these events, those that are cancelled, as a field of a page's head; else nothing.
create or replace function durable.cancelled_in(i_bodies text[]) returns text
language plpgsql stable
set search_path = pg_catalog, durable, pg_temp
as $$
begin
    if not exists (select from durable.cancelled) then
        return '';
    end if;
    return coalesce((
        select ',"cancelled":' || json_object_agg(durable.hex(c.id), c.reason)
        from durable.cancelled c
        where c.id in (select substr(l.line, 7, 32)::uuid from unnest(i_bodies) b, string_to_table(b, E'\n') l(line)
                       where l.line ~ '^\{"w":"[0-9a-f]{32}"')), '');
end
$$;

-- durable.has_ended_cancels(), durable.sweep_cancels(): cancels and pauses of workflows that have ended meanwhile. How many went.
create or replace function durable.has_ended_cancels() returns boolean
language sql stable security definer
set search_path = pg_catalog, durable, pg_temp
as $$
    select exists (select from durable.cancelled c where not durable.is_live(c.id))
        or exists (select from durable.pause p where p.scope = 'workflow' and not durable.is_live(durable.id_or_null(p.name)))
$$;

create or replace function durable.sweep_cancels() returns int
language plpgsql security definer
set search_path = pg_catalog, durable, pg_temp
as $$
declare
    v_gone int;
    v_pauses int;
begin
    delete from durable.cancelled c where not durable.is_live(c.id);
    get diagnostics v_gone = row_count;
    delete from durable.pause p where p.scope = 'workflow' and not durable.is_live(durable.id_or_null(p.name));
    get diagnostics v_pauses = row_count;
    return v_gone + v_pauses;
end
$$;

-- durable.taken_away(owner, keys): of these detached steps, those that are no longer this process's: their workflows were cancelled, or
-- they were given to another. Asked once a second by whoever runs any; reads only.
create or replace function durable.taken_away(i_owner bigint, i_keys text) returns text
language sql stable security definer
set search_path = pg_catalog, durable, pg_temp
as $$
    select coalesce(string_agg(k.key, E'\n'), '') from string_to_table(i_keys, E'\n') k(key)
    where not exists (select from durable.detached d where d.id = split_part(k.key, ':', 1)::uuid
                      and d.seq = split_part(k.key, ':', 2)::int and d.owner = i_owner)
$$;
