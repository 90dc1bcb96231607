-- What a linear workflow has behind it: its memo, as its step events carry it while it lives, and as durable.finished keeps it. Machines
-- carry nothing but the state of their next step.

-- durable.declare_types(names, versions, steps, all_steps, limited, histories): what the code that runs here says of its workflows: where each
-- begins, all steps of a machine with commas (a linear workflow: nothing), whether a limit counts them, which part of them is recorded (from
-- 0 to 1). One of each a line. Writes on change only. Who records needs a reader of the records first: see durable.keep_readers.
create or replace function durable.declare_types(i_names text, i_versions text, i_steps text, i_all_steps text, i_limited text, i_histories text)
returns void
language plpgsql security definer
set search_path = pg_catalog, durable, pg_temp
as $$
begin
    with said as (
        -- A column of nothing is no line at all.
        select q.name, q.version::int, q.step, string_to_array(coalesce(q.steps, ''), ',') as steps, coalesce(q.limited, '') <> '' as is_limited,
            q.history::float8
        from rows from (string_to_table(i_names, E'\n'), string_to_table(i_versions, E'\n'), string_to_table(i_steps, E'\n'),
            string_to_table(i_all_steps, E'\n'), string_to_table(i_limited, E'\n'), string_to_table(i_histories, E'\n'))
            q(name, version, step, steps, limited, history)
    )
    insert into durable.workflow_type as t (workflow, version, step, steps, is_limited, history)
    select s.* from said s
    where not exists (
        select from durable.workflow_type k
        where k.workflow = s.name
            and (k.version, k.step, k.steps, k.is_limited, k.history) = (s.version, s.step, s.steps, s.is_limited, s.history))
    order by s.name
    on conflict (workflow) do update
    set version = excluded.version, step = excluded.step, steps = excluded.steps, is_limited = excluded.is_limited,
        history = excluded.history;
    if durable.has_timeline() then
        -- As durable.try_maintenance has it, but waiting: days are made by looking first, and two that look at once would make one twice.
        perform pg_advisory_xact_lock(hashtextextended('durable timeline', 0));
        perform durable.keep_readers();
    end if;
end
$$;

-- durable.is_linear(workflow): whether a function is what it is made of; null: no code has run here that knows it.
create or replace function durable.is_linear(i_workflow text) returns boolean
language sql stable
set search_path = pg_catalog, durable, pg_temp
as $$ select t.step = 'workflow.start' from durable.workflow_type t where t.workflow = i_workflow $$;

-- durable.type_of(workflow): what code that ran here has said of it. DC006 if none has.
create or replace function durable.type_of(i_workflow text) returns durable.workflow_type
language plpgsql stable
set search_path = pg_catalog, durable, pg_temp
as $$
declare
    v_type durable.workflow_type;
begin
    select t.* into v_type from durable.workflow_type t where t.workflow = i_workflow;
    if not found then
        raise exception 'no code has run on this database that knows workflow ''%'', so nobody can say where it begins; start a cluster of its'
            ' app first', i_workflow using errcode = 'DC006';
    end if;
    return v_type;
end
$$;

-- durable.elements(json, field): the elements of an array in an object, in order; none where there is no array.
create or replace function durable.elements(i_json json, i_field text) returns json[]
language sql immutable
as $$
    select array(select e.value from json_array_elements(
                     case json_typeof(i_json -> i_field) when 'array' then i_json -> i_field else '[]' end) with ordinality e(value, o)
                 order by e.o)
$$;

-- durable.with_entries(carried, entries): the same with these in place of what it has (veiled; see durable.veiled), and nothing asked for.
create or replace function durable.with_entries(i_carried json, i_entries json[]) returns json
language sql immutable
as $$
    select ('{"m":[' || array_to_string(i_entries, ',') || ']'
        || coalesce((select string_agg(',' || to_json(e.key) || ':' || e.value, '' order by e.o)
                     from json_each(i_carried) with ordinality e(key, value, o) where e.key not in ('m', 'a')), '') || '}')::json
$$;

-- durable.whole(id, carried): the same with all that the workflow has on record in it (veiled), where it carries the newest only: see
-- durable.spill, and cluster/chunks.py, which does the same. Errors: DC006.
create or replace function durable.whole(i_id uuid, i_carried json) returns json
language plpgsql
set search_path = pg_catalog, durable, pg_temp
as $$
declare
    v_parts json[];
begin
    if i_carried -> 'c' is null then
        return i_carried;
    end if;
    v_parts := array(select durable.veiled(c.body)::json
                     from durable.chunks_of(i_id, (i_carried -> 'c' ->> 0)::bigint) with ordinality c(ref, body, o) order by o);
    perform durable.demand_plain(i_id, p::text) from unnest(v_parts) p;
    if cardinality(v_parts) <> (i_carried -> 'c' ->> 1)::int then
        raise exception 'what workflow %… has on record cannot be read: of % chunks % are there; ask again', durable.short(i_id),
            i_carried -> 'c' ->> 1, cardinality(v_parts) using errcode = 'DC006';
    end if;
    v_parts := v_parts || i_carried;
    return (
        with parts as materialized (
            select p.part, p.k from unnest(v_parts) with ordinality p(part, k)
        ), forgotten as materialized (
            select p.k, f.value #>> '{}' as position from parts p, unnest(durable.elements(p.part, 'f')) f(value)
        ), entries as (
            select '[' || string_agg(e.value::text, ',' order by p.k, e.o) || ']' as m
            from parts p, unnest(durable.elements(p.part, 'm')) with ordinality e(value, o)
            where not exists (select from forgotten f where f.k > p.k and starts_with(e.value ->> 0, f.position))
        ), instants as (
            select '{' || string_agg(to_json(i.key) || ':' || i.value, ',') || '}' as r
            from (select distinct on (e.key) e.key, e.value from parts p, json_each(coalesce(p.part -> 'r', '{}')) e
                  where not exists (select from forgotten f where f.k > p.k and starts_with(e.key, f.position))
                  order by e.key, p.k desc) i
        )
        select ('{"i":' || (select p.part -> 'i' from parts p where p.part -> 'i' is not null order by p.k desc limit 1)
            || ',"m":' || coalesce((select m from entries), '[]') || coalesce(',"r":' || (select r from instants), '')
            || coalesce((select string_agg(',' || to_json(e.key) || ':' || e.value, '' order by e.o)
                         from json_each(i_carried) with ordinality e(key, value, o) where e.key not in ('i', 'm', 'r', 'c', 'f')), '') || '}')::json);
end
$$;

-- durable.carried_in(line, progress): what a step event of a linear workflow carries, veiled: its input, what its awaits came to, and
-- which one it is the answer of. Null for one of a machine, and for what is not JSON.
--   progress  what its step last said, if that is not in the line: of several steps at once, those that have ended
create or replace function durable.carried_in(i_line text, i_progress text) returns json
language plpgsql stable
set search_path = pg_catalog, durable, pg_temp
as $$
declare
    v_line json;
    v_carried json;
begin
    v_line := durable.veiled(i_line)::json;
    v_carried := v_line -> 'd';
    if not coalesce(durable.is_linear(v_line ->> 'f'), false) then
        return null;
    elsif v_line ->> 's' = 'workflow.start' then
        return '{"i":' || v_carried || '}';
    elsif v_line ->> 's' = 'workflow.gather' then
        return durable.with_entries(v_carried, durable.elements(v_carried, 'm') || durable.elements(
            json_build_object('p', coalesce(durable.veiled(i_progress)::json, v_line -> 'p')), 'p'));
    end if;
    return v_carried;
exception when data_exception or program_limit_exceeded then
    return null;
end
$$;

-- durable.kept_memo(id, line): what is kept of a linear workflow that ends with this step event; null for a machine, for more than a payload
-- may have, and where it cannot be read. (cluster/keeping.py keeps that of those that a worker ends.)
create or replace function durable.kept_memo(i_id uuid, i_line text) returns text
language plpgsql
set search_path = pg_catalog, durable, pg_temp
as $$
declare
    v_carried json := durable.carried_in(i_line, null);
begin
    return case when coalesce((v_carried -> 'c' ->> 2)::bigint, 0) <= (select c.payload_bytes_max from durable.cluster c)
        then durable.unveiled(durable.whole(i_id, v_carried)::text) end;
exception when sqlstate 'DC006' or data_exception or program_limit_exceeded then
    return null;
end
$$;

-- durable.carried_of(id): the same of a workflow, wherever it stands, or as it ended. Null for a machine, for one whose memo was not kept,
-- and for an unknown id. Costs what durable.standing costs.
create or replace function durable.carried_of(i_id uuid) returns json
language plpgsql stable
set search_path = pg_catalog, durable, pg_temp
as $$
declare
    v_memo text;
begin
    select f.memo into v_memo from durable.finished f where f.id = i_id and f.day = durable.day_of(i_id);
    if found then
        return durable.veiled(v_memo)::json;
    end if;
    return (select durable.whole(i_id, durable.carried_in(s.line, s.progress)) from durable.standing(i_id) s
            order by substring(s.line from durable.line_pattern('n'))::int desc limit 1);
exception when data_exception or program_limit_exceeded then
    return null;
end
$$;

-- durable.is_coded(json): whether a codec of the app's has made this of a value: nothing here can look into it.
create or replace function durable.is_coded(i_json text) returns boolean
language sql immutable
as $$ select coalesce(starts_with(i_json, '{"$codec":'), false) $$;

-- durable.demand_plain(id, json): raises DC006 for a value that is coded, and bound to the workflow it is of.
create or replace function durable.demand_plain(i_id uuid, i_json text) returns void
language plpgsql
set search_path = pg_catalog, durable, pg_temp
as $$
begin
    if durable.is_coded(i_json) then
        raise exception 'what workflow %… carries is coded by its app''s codec, and only of use to itself; retry it, or cancel it and replay it when it'
            ' has ended, or fork it from its beginning', durable.short(i_id) using errcode = 'DC006';
    end if;
end
$$;

-- durable.no_memo(id, workflow): raises DC006: of this workflow nothing is kept that one could go on from.
create or replace function durable.no_memo(i_id uuid, i_workflow text) returns void
language plpgsql
set search_path = pg_catalog, durable, pg_temp
as $$
begin
    raise exception 'nothing is kept of what workflow %… (''%'') had behind it: it completed, and its kind is not declared with keeps_memo=True, or'
        ' it had too much, or its app has a codec; it can be replayed, and forked from its beginning', durable.short(i_id), i_workflow using errcode = 'DC006';
end
$$;

-- durable.history(id, limit): the awaits of a linear workflow that are recorded, in the order in which they ended, the newest at most; for
-- who holds the id: payloads. Of a machine: no row.
--   path    what durable.fork takes: where in the code, and what was asked for; 'cancel': from here on it cleaned up
--   status  completed, failed, cancelled, or open: here it stands
--   value   JSON: what it came to; of one that failed: the exception's class, message and arguments
-- Errors: DC003 for an unknown id, DC006 where nothing is kept, or no code has run that knows it.
create or replace function durable.history(i_id uuid, i_limit int default 1000)
returns table (number int, path text, status text, value text)
language plpgsql stable security definer
set search_path = pg_catalog, durable, pg_temp
as $$
declare
    v_workflow text := (select s.workflow from durable.started s where s.id = i_id and s.day = durable.day_of(i_id));
    v_carried json;
    v_entries json[];
begin
    if v_workflow is null then
        raise exception 'no workflow with the id %…', durable.short(i_id) using errcode = 'DC003';
    elsif (durable.type_of(v_workflow)).step <> 'workflow.start' then
        return;
    end if;
    v_carried := durable.carried_of(i_id);
    perform durable.demand_plain(i_id, v_carried::text);
    if v_carried is null then
        perform durable.no_memo(i_id, v_workflow);
    end if;
    v_entries := durable.elements(v_carried, 'm');
    return query select * from (
        select o::int, durable.unveiled(e ->> 0),
            case when e ->> 0 = 'cancel' then 'cancelled' when json_typeof(e -> 2) = 'array' then 'failed' else 'completed' end,
            durable.unveiled(case when json_typeof(e -> 2) = 'array' then e -> 2 else e -> 1 end::text)
        from unnest(v_entries) with ordinality q(e, o) where o > cardinality(v_entries) - i_limit
        union all
        select cardinality(v_entries) + 1, p, 'open', null from durable.open_path(i_id, v_carried) p where p is not null
        order by 1 desc limit i_limit) newest order by 1;
end
$$;

-- durable.paths(id, limit): the same without the values, for operators. bytes: how large each is.
create or replace function durable.paths(i_id uuid, i_limit int default 1000)
returns table (number int, path text, status text, bytes int)
language sql stable security definer
set search_path = pg_catalog, durable, pg_temp
as $$ select h.number, h.path, h.status, octet_length(h.value) from durable.history(i_id, i_limit) h $$;
