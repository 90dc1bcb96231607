-- Fork: a new workflow from a point of another, which stays as it is. Of a linear one all is kept that was recorded before an await; what a
-- worker does not come by when it feeds the function with that, it drops (see cluster/execution.py). A machine begins in one of its steps.

-- durable.fork(id, at, input, actor): a new workflow of the same kind, with its attributes and no key.
--   i_at     a linear workflow: a path of durable.history, or its position alone: that await and what follows happens anew; 'now': with all
--            that is recorded. A machine: a step. Null: from the beginning
--   i_input  JSON, in place of the original's; for a machine in a step: that step's state, which may be left out if it is stuck there
-- Result: the new id (whole: this is the one answer that gives it). Errors: DC003 for an unknown id; DC002 for a point that is none;
-- DC006 where it cannot be forked there, or anywhere; 40001 (a snapshot older than a rotation). Tables: see durable.start_from; a row
-- of started and one of finished for each child that comes along, and one of fanout.
create or replace function durable.fork(i_id uuid, i_at text default null, i_input text default null, i_actor text default null)
returns uuid
language plpgsql security definer
set search_path = pg_catalog, durable, pg_temp
as $$
declare
    v_first durable.started := durable.demand_started(i_id);
    v_type durable.workflow_type := durable.type_of(v_first.workflow);
    v_input text := durable.checked_payload(i_input);
begin
    perform durable.checked_label('actor', i_actor, 255);
    if i_at is null then
        v_input := coalesce(v_input, v_first.input);
        return durable.start_from(v_first, 'fork', v_type.version, v_type.step, v_input, v_input, '', i_actor);
    elsif v_type.step = 'workflow.start' then
        return durable.fork_linear(v_first, i_at, v_input, i_actor);
    end if;
    return durable.fork_machine(v_first, v_type, i_at, v_input, i_actor);
end
$$;

-- durable.fork_machine(…): in a step. One that is stuck there gives its state, the signal and the children that it was resumed by.
create or replace function durable.fork_machine(i_first durable.started, i_type durable.workflow_type, i_at text, i_state text, i_actor text)
returns uuid
language plpgsql
set search_path = pg_catalog, durable, pg_temp
as $$
declare
    v_line json;
    v_state text := i_state;
    v_more text := '';
    v_children int := 0;
    v_id uuid;
begin
    if i_at <> all (i_type.steps) then
        raise exception 'workflow ''%'' has no step ''%'' to be forked at; its steps are %', i_first.workflow, left(i_at, 80),
            array_to_string((i_type.steps)[:20], ', ') || case when cardinality(i_type.steps) > 20 then ', …' else '' end using errcode = 'DC002';
    elsif i_type.is_limited and i_at <> i_type.step then
        raise exception 'a limit counts workflows ''%'' by the state of their first step; fork it there: without a point, or at ''%''',
            i_first.workflow, i_type.step using errcode = 'DC006';
    end if;
    begin
        v_line := (select durable.veiled(d.line)::json from durable.dead_letter d
                   where d.id = i_first.id and d.step = i_at order by d.seq desc limit 1);
    exception when data_exception or program_limit_exceeded then
        null;
    end;
    if v_state is null and v_line is null then
        raise exception 'give the state of step ''%'' as the input: its own is known only while the workflow is stuck there', i_at
            using errcode = 'DC002';
    elsif v_line is not null then
        perform durable.demand_plain(i_first.id, case when i_state is null then (v_line -> 'd')::text end);
        perform durable.demand_plain(i_first.id, (v_line -> 'e' -> 'payload')::text);
        v_state := coalesce(v_state, durable.unveiled((v_line -> 'd')::text));
        v_more := coalesce(',"e":' || durable.unveiled((v_line -> 'e')::text), '') || coalesce(',"j":' || (v_line -> 'j')::text, '');
        v_children := case when v_line -> 'j' is null then 0 else coalesce((select g.total from durable.group_of(i_first.id) g), 0) end;
        if v_children > durable.ended_children(i_first.id) then
            raise exception 'step ''%'' of workflow %… has children that live; fork it when they have ended', i_at, durable.short(i_first.id)
                using errcode = 'DC006';
        end if;
    end if;
    v_id := durable.start_from(i_first, 'fork', i_type.version, i_at, v_state, case when i_at = i_type.step then v_state else i_first.input end, v_more, i_actor);
    perform durable.copy_children(i_first.id, v_id, v_children);
    return v_id;
end
$$;

-- durable.fork_linear(…): with all that was recorded before an await, and so of the version whose code came that way.
create or replace function durable.fork_linear(i_first durable.started, i_at text, i_input text, i_actor text) returns uuid
language plpgsql
set search_path = pg_catalog, durable, pg_temp
as $$
declare
    v_carried json := durable.carried_of(i_first.id);
    v_entries json[] := durable.elements(v_carried, 'm');
    v_paths text[] := array(select durable.unveiled(e ->> 0) from unnest(v_entries) with ordinality q(e, o) order by o);
    v_open text := durable.open_path(i_first.id, v_carried);
    v_cut int;
    v_children int;
    v_ended int;
    v_id uuid;
begin
    perform durable.demand_plain(i_first.id, v_carried::text);
    if v_carried is null then
        perform durable.no_memo(i_first.id, i_first.workflow);
    end if;
    v_cut := (select min(o) from unnest(v_paths || v_open) with ordinality q(path, o) where i_at in (path, split_part(path, ' ', 1)));
    if i_at = 'now' and v_open is not null then
        v_cut := cardinality(v_paths) + 1;
    end if;
    if v_cut is null then
        raise exception 'workflow %… (''%'') cannot be forked at ''%''; it can at %', durable.short(i_first.id), i_first.workflow, left(i_at, 80),
            durable.told_paths(v_paths || v_open) using errcode = 'DC002';
    elsif array_position(v_paths, 'cancel') < v_cut then
        raise exception '''%'' is of the cleanup after a cancel; fork workflow %… at ''cancel'', as if nobody had, or before that', i_at,
            durable.short(i_first.id) using errcode = 'DC006';
    end if;
    v_children := durable.children_before(v_carried, v_paths[v_cut]);
    if v_children > 0 then
        v_ended := durable.ended_children(i_first.id);
        if v_children > v_ended then
            raise exception 'before ''%'' workflow %… started children that have not ended; fork it when they have, or at % at the latest', i_at,
                durable.short(i_first.id),
                coalesce((select '''' || path || '''' from unnest(v_paths) with ordinality q(path, o)
                          where o < v_cut and durable.children_before(v_carried, path) <= v_ended order by o desc limit 1),
                    'its beginning (without a point)')
                using errcode = 'DC006';
        end if;
    end if;
    v_carried := durable.with_entries(v_carried, v_entries[:v_cut - 1]);
    v_id := durable.start_from(i_first, 'fork', i_first.version, 'workflow.resume', durable.unveiled((
            select '{' || string_agg(to_json(e.key) || ':'
                    || case when e.key = 'i' and i_input is not null then durable.veiled(i_input) else e.value::text end, ',' order by e.o)
                || ',"o":true' || case when v_children > 0 then ',"k":' || v_children else '' end || '}'
            from json_each(v_carried) with ordinality e(key, value, o) where e.key not in ('k', 'o'))),
        coalesce(i_input, i_first.input), '', i_actor);
    perform durable.copy_children(i_first.id, v_id, v_children);
    return v_id;
end
$$;

-- durable.open_path(id, carried): where it stands: the await that its next step answers, 'now' where there may be several; null: nowhere.
create or replace function durable.open_path(i_id uuid, i_carried json) returns text
language sql stable
set search_path = pg_catalog, durable, pg_temp
as $$ select coalesce(durable.unveiled(i_carried -> 'a' ->> 0), case when durable.is_live(i_id) then 'now' end) $$;

-- durable.told_paths(paths): the newest of them, for a message.
create or replace function durable.told_paths(i_paths text[]) returns text
language sql immutable
as $$
    select coalesce(case when count(*) > 20 then '…, ' else '' end
        || string_agg('''' || p || '''', ', ' order by o) filter (where o > cardinality(i_paths) - 21), 'no await yet, only from its beginning')
    from unnest(i_paths) with ordinality q(p, o) where p is not null
$$;

-- durable.children_before(carried, path): how many children the workflow may have started before this await; null: all that it has.
-- Each spawn is recorded where the code did it. One at this await's place in its branch or behind it came later, and so did all that have
-- a higher number; of those in other branches nobody knows, so they count.
create or replace function durable.children_before(i_carried json, i_path text) returns int
language sql immutable
set search_path = pg_catalog, durable, pg_temp
as $$
    with cut as (
        select regexp_replace(split_part(i_path, ' ', 1), '[0-9]+$', '') as branch,
            substring(split_part(i_path, ' ', 1) from '[0-9]+$')::int as place
    ), spawns as (
        select split_part(durable.unveiled(e.key), ' ', 1) as at, e.value::text::int as number
        from json_each(coalesce(i_carried -> 'r', '{}')) e where e.key ~ '^[0-9.~]+ spawn$'
    ), later as (
        select s.number from spawns s, cut c
        where starts_with(s.at, c.branch) and substring(substr(s.at, length(c.branch) + 1) from '^([0-9]+)(?:~|$)')::int >= c.place
    )
    select least((select min(l.number) from later l), coalesce((i_carried ->> 'k')::int, 0))
$$;

-- durable.ended_children(id): the number of the first child of its group that has not ended, or is gone: so many from the first on have.
create or replace function durable.ended_children(i_id uuid) returns int
language sql stable
set search_path = pg_catalog, durable, pg_temp
as $$
    select coalesce(min(c.number) filter (where f.id is null or c.place <> c.number), count(*))::int
    from (select s.id, s.day, s.number, row_number() over (order by s.number) - 1 as place
          from durable.fanout g join durable.started s on s.parent = g.id and s.parent_seq = g.seq where g.id = i_id) c
    left join durable.finished f on f.id = c.id and f.day = c.day
$$;

-- durable.copy_children(of, to, n): the first n children of a workflow's group, which have ended, become children of another, as they ended.
-- They are copies of what became of them, and run no more: the other reads and awaits them as its own.
create or replace function durable.copy_children(i_of uuid, i_to uuid, i_n int) returns void
language plpgsql
set search_path = pg_catalog, durable, pg_temp
as $$
declare
    v_max constant int := 10000;
    v_now timestamptz := durable.now();
begin
    if i_n > v_max then
        raise exception 'workflow %… started % children before that point; with more than % it cannot be forked', durable.short(i_of), i_n, v_max
            using errcode = 'DC006';
    elsif i_n = 0 then
        return;
    end if;
    with originals as materialized (
        select durable.new_id(v_now) as new_id, s.id, s.workflow, s.version, s.input, s.number, f.status, f.output, f.memo
        from durable.fanout g
        join durable.started s on s.parent = g.id and s.parent_seq = g.seq and s.number < i_n
        join durable.finished f on f.id = s.id and f.day = s.day
        where g.id = i_of
    ), begun as (
        insert into durable.started (id, day, workflow, version, input, at, parent, parent_seq, number, origin)
        select o.new_id, durable.day_of(o.new_id), o.workflow, o.version, o.input, v_now, i_to, 1, o.number, o.id from originals o
    ), ended as (
        insert into durable.finished (id, day, status, output, at, memo)
        select o.new_id, durable.day_of(o.new_id), o.status, o.output, v_now, o.memo from originals o
    )
    insert into durable.fanout (id, day, seq, total, completed, failed, wait_seq, keeps)
    select i_to, durable.day_at(v_now), 1, count(*), count(*) filter (where o.status = 'completed'), count(*) filter (where o.status <> 'completed'),
        case when not g.keeps then 1 end, g.keeps
    from originals o, durable.fanout g where g.id = i_of group by g.keeps;
end
$$;
