-- Finding workflows. What is asked for is put together as one query, so that the planner sees what is asked and what it is worth.
-- Whoever may look sees 12 digits of an id, and nothing here compares more of one: an answer to "is it above this id?" or "does it
-- begin so?", asked a hundred times, would give a whole id away.

-- durable.cursor_of(at, short), durable.cursor_at(cursor), durable.cursor_short(cursor): where a list goes on: a moment in microseconds
-- and 12 digits. A cursor that is none: DC002.
create or replace function durable.cursor_of(i_at timestamptz, i_short text) returns text
language sql immutable
as $$ select to_hex((extract(epoch from i_at) * 1000000)::bigint) || '-' || i_short $$;

create or replace function durable.cursor_at(i_cursor text) returns timestamptz
language plpgsql immutable
set search_path = pg_catalog, durable, pg_temp
as $$
begin
    if i_cursor !~ '^[0-9a-f]{1,14}-[0-9a-f]{12}$' then
        raise exception 'that is no cursor of a list; pass the one of its last row' using errcode = 'DC002';
    end if;
    return 'epoch'::timestamptz + ('x' || lpad(split_part(i_cursor, '-', 1), 16, '0'))::bit(64)::bigint * interval '1 microsecond';
end
$$;

create or replace function durable.cursor_short(i_cursor text) returns text
language sql immutable
as $$ select split_part(i_cursor, '-', 2) $$;

-- durable.first_digits(hex): at most 12 digits of an id, else DC002.
create or replace function durable.first_digits(i_hex text) returns text
language plpgsql immutable
set search_path = pg_catalog, durable, pg_temp
as $$
declare
    v_hex text := lower(replace(i_hex, '-', ''));
begin
    if v_hex !~ '^[0-9a-f]{1,32}$' then
        raise exception 'an id is up to 32 hex digits' using errcode = 'DC002';
    end if;
    return left(v_hex, 12);
end
$$;

-- durable.list_query(…): the query of durable.list, which says what its arguments are. Its parameters: $1 workflow, $2 limit, $3 cursor,
-- $4 attributes, $5 from, $6 to, $7 the parent's first digits, $8 key, $9 status;
-- $10, $11, $12 the days of $3, $5, $6; $13 the origin's first digits.
-- Newest first by the index on at. Those of one moment and one short id come together, also beyond the limit: paging on by what a
-- cursor says would pass them over. The day of a workflow is that of its start, or, around midnight, the one before.
create or replace function durable.list_query(i_workflow text, i_status text, i_after text, i_attributes jsonb, i_from timestamptz,
    i_to timestamptz, i_parent text, i_key text, i_origin text) returns text
language sql immutable
as $$
    select 'select s.id, s.day, s.workflow, s.version, s.key, s.at, s.parent, s.origin from durable.started s where true'
        || case when i_workflow is not null then ' and s.workflow = $1' else '' end
        || case when i_after is not null then
            ' and s.at <= durable.cursor_at($3) and s.day <= $10'
            ' and (s.at < durable.cursor_at($3) or durable.short(s.id) < durable.cursor_short($3))' else '' end
        || case when i_attributes is not null then
            ' and exists (select from durable.attribute a where a.id = s.id and a.attributes @> $4)' else '' end
        || case when i_from is not null then ' and s.at >= $5 and s.day >= $11 - 1' else '' end
        || case when i_to is not null then ' and s.at < $6 and s.day <= $12' else '' end
        || case when i_parent is not null then
            ' and s.parent between rpad($7, 32, ''0'')::uuid and rpad($7, 32, ''f'')::uuid' else '' end
        || case when i_origin is not null then
            ' and s.origin between rpad($13, 32, ''0'')::uuid and rpad($13, 32, ''f'')::uuid' else '' end
        || case when i_key is not null then
            ' and s.key = $8 and s.id in (select k.id from durable.key k where k.key = $8'
            || case when i_workflow is not null then ' and k.workflow = $1)' else ')' end else '' end
        || case when i_status in ('running', 'stuck') then
            ' and not exists (select from durable.finished f where f.id = s.id and f.day = s.day) and '
            || case i_status when 'running' then 'not ' else '' end || 'exists (select from durable.dead_letter d where d.id = s.id)'
            when i_status is not null then
            ' and exists (select from durable.finished f where f.id = s.id and f.day = s.day and f.status = $9)' else '' end
        || ' order by s.at desc, durable.short(s.id) desc fetch first $2 rows with ties'
$$;

-- durable.list(…): workflows, newest first, ids truncated.
--   i_status      running, stuck, completed, failed or cancelled
--   i_after       the cursor of the last row so far; a page has more rows than i_limit only where they share moment and short id
--   i_attributes  JSON: workflows that have all of these
--   i_from, i_to  started then or later, and earlier than that
--   i_parent      the first digits of the id of the workflow that spawned them; more than 12 are not looked at
--   i_key         theirs, in whatever type; with i_workflow that is one look-up
--   i_origin      the first digits of the id of the workflow that they were replayed or forked from
-- Who runs is who has no end: nothing but a comparison of starts and ends tells. It is made over an hour, four, sixteen and so on back,
-- because those that run are mostly among the newest.
create or replace function durable.list(i_workflow text default null, i_status text default null, i_limit int default 50,
    i_after text default null, i_attributes text default null, i_from timestamptz default null, i_to timestamptz default null,
    i_parent text default null, i_key text default null, i_origin text default null)
returns table (id text, workflow text, version int, status text, key text, started_at timestamptz, finished_at timestamptz,
    attributes jsonb, parent text, cursor text, origin text)
language plpgsql stable security definer
set search_path = pg_catalog, durable, pg_temp set enable_partitionwise_join = on set jit = off
as $$
declare
    v_attributes jsonb := durable.checked_attributes(i_attributes);
    v_left int := i_limit;
    v_from timestamptz := i_from;
    v_to timestamptz := i_to;
    v_hours int := 1;
    v_found int;
begin
    if i_status not in ('running', 'stuck', 'completed', 'failed', 'cancelled') then
        raise exception 'a status is running, stuck, completed, failed or cancelled, not %', quote_literal(left(i_status, 40))
            using errcode = 'DC002';
    end if;
    if coalesce(i_limit not between 1 and 10000, true) then
        raise exception 'a limit of % is out of range; choose 1 to 10000', coalesce(i_limit::text, 'null') using errcode = 'DC002';
    end if;
    perform durable.cursor_at(i_after);
    loop
        if i_status = 'running' then
            v_from := greatest(i_from, least(v_to, durable.cursor_at(i_after), durable.now()) - make_interval(hours => v_hours));
        end if;
        return query execute
            'select durable.short(w.id), w.workflow, w.version, coalesce(f.status, case when exists ('
            '   select from durable.dead_letter d where d.id = w.id) then ''stuck'' else ''running'' end), w.key, w.at, f.at,'
            ' coalesce(a.attributes, ''{}''), durable.short(w.parent), durable.cursor_of(w.at, durable.short(w.id)),'
            ' durable.short(w.origin)'
            ' from (' || durable.list_query(i_workflow, i_status, i_after, v_attributes, v_from, v_to, i_parent, i_key, i_origin) || ') w'
            ' left join durable.finished f on f.id = w.id and f.day = w.day'
            ' left join durable.attribute a on a.id = w.id'
            ' order by w.at desc, durable.short(w.id) desc, w.id desc'
            using i_workflow, v_left, i_after, v_attributes, v_from, v_to, durable.first_digits(i_parent), i_key, i_status,
                durable.day_at(durable.cursor_at(i_after)), durable.day_at(v_from), durable.day_at(v_to),
                durable.first_digits(i_origin);
        get diagnostics v_found = row_count;
        v_left := v_left - v_found;
        exit when v_left <= 0 or v_from is not distinct from i_from
            or not exists (select from durable.started s where s.at < v_from and s.day <= durable.day_at(v_from));
        v_to := v_from;
        v_hours := v_hours * 4;
    end loop;
end
$$;

-- durable.list_total(…): how many workflows match, and the moment of the newest. Arguments: see durable.list.
create or replace function durable.list_total(i_workflow text default null, i_status text default null, i_attributes text default null,
    i_from timestamptz default null, i_to timestamptz default null, i_parent text default null, i_key text default null,
    i_origin text default null, out workflows bigint, out newest timestamptz)
language plpgsql stable security definer
set search_path = pg_catalog, durable, pg_temp set enable_partitionwise_join = on set jit = off
as $$
declare
    v_attributes jsonb := durable.checked_attributes(i_attributes);
begin
    execute 'select count(*), max(w.at) from ('
        || durable.list_query(i_workflow, i_status, null, v_attributes, i_from, i_to, i_parent, i_key, i_origin) || ') w'
        into workflows, newest
        using i_workflow, 2147483647, null::text, v_attributes, i_from, i_to, durable.first_digits(i_parent), i_key, i_status,
            null::int, durable.day_at(i_from), durable.day_at(i_to), durable.first_digits(i_origin);
end
$$;
