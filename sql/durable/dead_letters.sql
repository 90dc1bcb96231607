-- A dead letter is a step that cannot go on, kept whole. Its workflow has not ended: a retry takes it up where it stopped, a purge
-- ends it. Deleting the row is the right to do either, so of two that try one finds nothing.

-- durable.veiled(json), durable.unveiled(text): JSON without \u escapes, and back. A state may hold \u0000 or half a surrogate pair,
-- which is valid JSON and no text of Postgres: json's operators refuse the whole line for it. With ~1 for each \u, and ~0 for each ~,
-- they read everything beside it, and hand it on as it was written. An escape is one if an even number of backslashes precedes it.
create or replace function durable.veiled(i_json text) returns text
language sql immutable parallel safe
as $$ select regexp_replace(replace(i_json, '~', '~0'), '(?<!\\)((?:\\\\)*)\\u', '\1~1', 'g') $$;

create or replace function durable.unveiled(i_text text) returns text
language sql immutable parallel safe
as $$ select replace(replace(i_text, '~1', '\u'), '~0', '~') $$;

-- durable.attempt_of(line): the attempt an envelope says it is, else 1.
create or replace function durable.attempt_of(i_line text) returns int
language plpgsql immutable
set search_path = pg_catalog, durable, pg_temp
as $$
begin
    return coalesce(substring(durable.veiled(i_line)::json ->> 'a' from '^[0-9]{1,9}$')::int, 1);
exception when data_exception or program_limit_exceeded then
    return 1;
end
$$;

-- durable.line_again(line, state): the envelope that takes a dead letter up again, or null for one that is not JSON.
-- The next seq and the next attempt, so that the idempotency key, which is made from their difference, stays what it was; g says how
-- many attempts were spent before, so that the retry policy counts from here; u, the tries to find code for the step, begins anew.
-- All other fields stay as they are, also those that this version does not know; d is the edited state if there is one.
-- Built here and not by the codec in Python: who may retry is not always allowed to read.
create or replace function durable.line_again(i_line text, i_state text default null) returns text
language plpgsql immutable
set search_path = pg_catalog, durable, pg_temp
as $$
declare
    v_attempt int := durable.attempt_of(i_line);
    v_head text := format('{"w":"%s","n":%s,"f":"%s","s":"%s"', substring(i_line from durable.line_pattern('w')),
        substring(i_line from durable.line_pattern('n'))::int + 1, substring(i_line from durable.line_pattern('f')),
        substring(i_line from durable.line_pattern('s')));
begin
    return v_head || durable.unveiled((
            select string_agg(',' || to_json(e.key) || ':'
                || case when e.key = 'd' and i_state is not null then durable.veiled(i_state) else e.value::text end, '' order by e.o)
            from json_each(durable.veiled(i_line)::json) with ordinality e(key, value, o)
            where e.key not in ('w', 'n', 'f', 's', 'a', 'g', 'u')))
        || format(',"a":%s,"g":%s}', v_attempt + 1, v_attempt);
exception when data_exception or program_limit_exceeded then
    return null;
end
$$;

-- durable.told(details, …): details that any listing can read: an object with a reason, a step, a seq and an attempt.
create or replace function durable.told(i_details text, i_step text, i_seq int, i_attempt int) returns text
language plpgsql immutable
set search_path = pg_catalog, durable, pg_temp
as $$
declare
    v_known jsonb := jsonb_build_object('reason', left(i_details, 1000), 'step', i_step, 'seq', i_seq, 'attempt', i_attempt);
begin
    return case when jsonb_typeof(i_details::jsonb) = 'object' then v_known - 'reason' || '{"reason": "unknown"}' || i_details::jsonb
        else v_known end;
exception when data_exception or program_limit_exceeded then
    return v_known;
end
$$;

-- durable.bury(lines, reasons, details): dead letters from envelopes, in the transaction of their page. One of each a line.
-- Reasons: attempts, given_up, crashes, unroutable. A line without an envelope's head belongs to no workflow and is dropped.
-- Tables: dead_letter (one row a line).
create or replace function durable.bury(i_lines text, i_reasons text, i_details text) returns void
language plpgsql security definer
set search_path = pg_catalog, durable, pg_temp
as $$
declare
    v_lines text[] := string_to_array(i_lines, E'\n');
    v_reasons text[] := string_to_array(i_reasons, E'\n');
    v_details text[] := string_to_array(i_details, E'\n');
begin
    if cardinality(v_lines) <> cardinality(v_reasons) or cardinality(v_lines) <> cardinality(v_details) then
        raise exception '% dead letters with % reasons and % details; give one of each a line',
            cardinality(v_lines), cardinality(v_reasons), cardinality(v_details) using errcode = 'DC002';
    end if;
    if not v_reasons <@ array['attempts', 'given_up', 'crashes', 'unroutable'] then
        raise exception 'a dead letter''s reason is attempts, given_up, crashes or unroutable, not %', left(i_reasons, 80)
            using errcode = 'DC002';
    end if;
    insert into durable.dead_letter (id, seq, workflow, step, attempt, reason, details, line, at)
    select h.id::uuid, h.seq, h.workflow, h.step, h.attempt, q.reason, durable.told(q.details, h.step, h.seq, h.attempt), q.line,
        durable.now()
    from unnest(v_lines, v_reasons, v_details) q(line, reason, details)
    cross join lateral (
        select substring(q.line from durable.line_pattern('w')) id, substring(q.line from durable.line_pattern('n'))::int seq,
            substring(q.line from durable.line_pattern('f')) workflow, substring(q.line from durable.line_pattern('s')) step,
            durable.attempt_of(q.line) attempt) h
    where h.id is not null
    on conflict do nothing;
end
$$;

-- durable.dead_letters(…): dead letters, newest first, ids truncated; page on with i_before = the last row's at.
-- Those that share the last row's moment come too, also beyond the limit: paging on would pass them over.
create or replace function durable.dead_letters(i_workflow text default null, i_step text default null, i_reason text default null,
    i_limit int default 50, i_before timestamptz default 'infinity')
returns table (id text, workflow text, step text, seq int, attempt int, reason text, message text, at timestamptz)
language sql stable security definer
set search_path = pg_catalog, durable, pg_temp
as $$
    select durable.short(d.id), d.workflow, d.step, d.seq, d.attempt, d.reason, left(d.details::jsonb ->> 'reason', 200), d.at
    from durable.dead_letter d
    where d.at < i_before
        and (i_workflow is null or d.workflow = i_workflow)
        and (i_step is null or d.step = i_step)
        and (i_reason is null or d.reason = i_reason)
    order by d.at desc fetch first i_limit rows with ties
$$;

-- durable.dead_letter_total(…): how many there are, and the moment of the newest.
--   i_most   so many are counted and no more; null: all
create or replace function durable.dead_letter_total(i_workflow text default null, i_step text default null,
    i_reason text default null, i_most bigint default null, out letters bigint, out newest timestamptz)
language sql stable security definer
set search_path = pg_catalog, durable, pg_temp
as $$
    select count(*), max(d.at) from (
        select d.at from durable.dead_letter d
        where (i_workflow is null or d.workflow = i_workflow)
            and (i_step is null or d.step = i_step)
            and (i_reason is null or d.reason = i_reason)
        order by d.at desc limit i_most) d
$$;

-- durable.dead_letter_of(id): all of a workflow's dead letter but the state, or nothing.
create or replace function durable.dead_letter_of(i_id uuid)
returns table (workflow text, step text, seq int, attempt int, reason text, details text, at timestamptz)
language sql stable security definer
set search_path = pg_catalog, durable, pg_temp
as $$
    select d.workflow, d.step, d.seq, d.attempt, d.reason, d.details, d.at
    from durable.dead_letter d where d.id = i_id order by d.seq desc limit 1
$$;

-- durable.dead_letter_state(id): the state its step ran with, as JSON; null if it cannot be read. A payload: not for operators.
create or replace function durable.dead_letter_state(i_id uuid) returns text
language plpgsql stable security definer
set search_path = pg_catalog, durable, pg_temp
as $$
begin
    return (select durable.unveiled((durable.veiled(d.line)::json -> 'd')::text)
        from durable.dead_letter d where d.id = i_id order by d.seq desc limit 1);
exception when data_exception or program_limit_exceeded then
    return null;
end
$$;

-- durable.dead_letters_by_prefix(hex): the ids among dead letters that begin with these digits, three at the most.
create or replace function durable.dead_letters_by_prefix(i_hex text) returns setof uuid
language sql stable security definer
set search_path = pg_catalog, durable, pg_temp
as $$
    select distinct d.id from durable.dead_letter d
    where d.id between rpad(i_hex, 32, '0')::uuid and rpad(i_hex, 32, 'f')::uuid order by d.id limit 3
$$;

-- durable.no_dead_letter(id): raises DC003, the answer to whoever comes too late or asks for what never was.
create or replace function durable.no_dead_letter(i_id uuid) returns void
language plpgsql
set search_path = pg_catalog, durable, pg_temp
as $$
begin
    raise exception 'no dead letter of a workflow % is here (any more): somebody retried or purged it, or there never was one;'
        ' see ''durable-cluster dead-letters list''', durable.short(i_id) using errcode = 'DC003';
end
$$;

-- durable.retry_dead_letter(id, state, seq): takes a stuck workflow up again where it stopped, with an edited state if one is given.
--   i_seq  the dead letter that is meant: a state was checked against one step and must not reach another
-- Tables: dead_letter (one row deleted), the shard's log (one event). Errors: DC002 (the state, or the letter, is not JSON),
-- DC003 (there is none), 40001 (a snapshot older than a rotation).
create or replace function durable.retry_dead_letter(i_id uuid, i_state text default null, i_seq int default null) returns void
language plpgsql security definer
set search_path = pg_catalog, durable, pg_temp
as $$
declare
    v_state text := durable.checked_payload(i_state);
    v_line text;
begin
    delete from durable.dead_letter d
    where d.id = i_id and d.seq = (select max(x.seq) from durable.dead_letter x where x.id = i_id) and d.seq = coalesce(i_seq, d.seq)
    returning d.line into v_line;
    if not found then
        perform durable.no_dead_letter(i_id);
    end if;
    v_line := durable.line_again(v_line, v_state);
    if v_line is null then
        raise exception 'the dead letter of workflow % is not JSON and cannot be taken up again; it can only be purged',
            durable.short(i_id) using errcode = 'DC002';
    end if;
    perform durable.append_lines(array[i_id], array[v_line]);
    perform durable.record('retry', array[i_id], null, array[jsonb_build_object('edited', i_state is not null)]);
end
$$;

-- durable.retry_dead_letters(…): as retry_dead_letter, for those that match, oldest first, 1,000 a call at the most. How many.
-- Those that somebody else is busy with are left to them, those that are not JSON stay.
create or replace function durable.retry_dead_letters(i_workflow text default null, i_step text default null,
    i_reason text default null, i_limit int default 1000, i_before timestamptz default 'infinity') returns int
language plpgsql security definer
set search_path = pg_catalog, durable, pg_temp
as $$
declare
    v_ids uuid[];
    v_lines text[];
begin
    with chosen as (
        select d.id, d.seq from durable.dead_letter d
        where d.at < i_before
            and (i_workflow is null or d.workflow = i_workflow)
            and (i_step is null or d.step = i_step)
            and (i_reason is null or d.reason = i_reason)
            and durable.line_again(d.line) is not null
        order by d.at, d.id, d.seq limit least(i_limit, 1000) for update skip locked
    ), gone as (
        delete from durable.dead_letter d using chosen c where d.id = c.id and d.seq = c.seq returning d.id, d.line, d.at
    )
    select array_agg(g.id order by g.at), array_agg(durable.line_again(g.line) order by g.at) into v_ids, v_lines from gone g;
    perform durable.append_lines(v_ids, v_lines);
    perform durable.record('retry', v_ids);
    return coalesce(cardinality(v_ids), 0);
end
$$;

-- durable.purge_dead_letter(id): ends a stuck workflow: failed, with what its dead letter says. DC003 if there is none.
-- Tables: dead_letter (one row deleted), finished (one row).
create or replace function durable.purge_dead_letter(i_id uuid) returns void
language plpgsql security definer
set search_path = pg_catalog, durable, pg_temp
as $$
declare
    v_details text;
    v_line text;
begin
    delete from durable.dead_letter d
    where d.id = i_id and d.seq = (select max(x.seq) from durable.dead_letter x where x.id = i_id)
    returning d.details, d.line into v_details, v_line;
    if not found then
        perform durable.no_dead_letter(i_id);
    end if;
    perform durable.end_purged(array[i_id], array[v_details], array[v_line]);
end
$$;

-- durable.purge_dead_letters(…): as purge_dead_letter, for those that match, oldest first, 1,000 a call at the most. How many.
create or replace function durable.purge_dead_letters(i_workflow text default null, i_step text default null,
    i_reason text default null, i_limit int default 1000, i_before timestamptz default 'infinity') returns int
language plpgsql security definer
set search_path = pg_catalog, durable, pg_temp
as $$
declare
    v_ids uuid[];
    v_details text[];
    v_lines text[];
begin
    with chosen as (
        select d.id, d.seq from durable.dead_letter d
        where d.at < i_before
            and (i_workflow is null or d.workflow = i_workflow)
            and (i_step is null or d.step = i_step)
            and (i_reason is null or d.reason = i_reason)
        order by d.at, d.id, d.seq limit least(i_limit, 1000) for update skip locked
    ), gone as (
        delete from durable.dead_letter d using chosen c where d.id = c.id and d.seq = c.seq returning d.id, d.details, d.line
    )
    select array_agg(g.id), array_agg(g.details), array_agg(g.line) into v_ids, v_details, v_lines from gone g;
    perform durable.end_purged(v_ids, v_details, v_lines);
    return coalesce(cardinality(v_ids), 0);
end
$$;

-- durable.end_purged(ids, details, lines): the terminal records of purged workflows.
create or replace function durable.end_purged(i_ids uuid[], i_details text[], i_lines text[]) returns void
language sql volatile
set search_path = pg_catalog, durable, pg_temp
as $$
    select durable.finish(array_agg(q.id), array_agg('failed'::text), array_agg((q.details::jsonb || '{"purged": true}')::text),
        array_agg(durable.kept_memo(q.id, q.line)))
    from unnest(i_ids, i_details, i_lines) q(id, details, line);
    select durable.record('purge', i_ids);
$$;
