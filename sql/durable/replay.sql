-- Replay: a workflow starts over, with its input and nothing else. One that is stuck does so itself; of one that has ended a new one is
-- started. (A retry, in contrast, takes a dead letter up where it stopped; a fork begins in the middle.) Deleting the dead letter is the
-- right to replay it, as it is the right to retry and to purge it: of two that try one finds nothing.

-- durable.demand_started(id): the row of its start, else DC003.
create or replace function durable.demand_started(i_id uuid) returns durable.started
language plpgsql stable
set search_path = pg_catalog, durable, pg_temp
as $$
declare
    v_first durable.started;
begin
    select s.* into v_first from durable.started s where s.id = i_id and s.day = durable.day_of(i_id);
    if not found then
        raise exception 'no workflow with the id %…', durable.short(i_id) using errcode = 'DC003';
    end if;
    return v_first;
end
$$;

-- durable.start_from(origin, what, version, step, state, input, more, actor): a new workflow of the kind that this row started, with its attributes
-- and no key. Its first step event is that step with that state, and more fields if there are any.
-- Tables: started, attribute, the shard's log, audit.
create or replace function durable.start_from(i_origin durable.started, i_what text, i_version int, i_step text, i_state text, i_input text,
    i_more text, i_actor text) returns uuid
language plpgsql
set search_path = pg_catalog, durable, pg_temp
as $$
declare
    v_id uuid := durable.new_id();
begin
    insert into durable.started (id, day, workflow, version, input, at, origin)
    values (v_id, durable.day_of(v_id), i_origin.workflow, i_version, i_input, durable.now(), i_origin.id);
    insert into durable.attribute (id, attributes) select v_id, a.attributes from durable.attribute a where a.id = i_origin.id;
    perform durable.append_lines(array[v_id],
        array[left(durable.line(v_id, 1, i_origin.workflow, i_step, i_version, i_state), -1) || i_more || '}']);
    perform durable.record(i_what, array[i_origin.id, v_id], i_actor, array[
        jsonb_build_object('to', durable.short(v_id)), jsonb_build_object('from', durable.short(i_origin.id), 'workflow', i_origin.workflow)]);
    return v_id;
end
$$;

-- durable.start_over(first, actor): a stuck workflow begins with its first step again. Whether it was stuck.
-- What it was sent and has not read stays in its mailbox. The keys of signals are forgotten: whoever sent one that it has read may send it
-- again. The numbers of tokens go on, or one that was used would answer a wait of its second life. Its seq goes on too.
-- Tables: dead_letter (a row deleted), fanout, signal_key, progress, the shard's log, audit.
create or replace function durable.start_over(i_first durable.started, i_actor text) returns boolean
language plpgsql
set search_path = pg_catalog, durable, pg_temp
as $$
declare
    v_type durable.workflow_type := durable.type_of(i_first.workflow);
    v_line text;
    v_seq int;
    v_step text := v_type.step;
    v_state text := i_first.input;
begin
    with gone as (delete from durable.dead_letter d where d.id = i_first.id returning d.line, d.seq)
    select g.line, g.seq into v_line, v_seq from gone g order by g.seq desc limit 1;
    if v_seq is null then
        return false;
    end if;
    if v_step = 'workflow.start' then
        v_step := 'workflow.resume';
        if durable.carried_in(v_line, null) -> 'c' is not null then
            -- Nothing that it has on record counts any more.
            perform durable.put_chunks(durable.hex(i_first.id) || repeat('0', 24));
        end if;
        v_state := '{"i":' || i_first.input || coalesce(',"t":' || (durable.carried_in(v_line, null) ->> 't'), '') || ',"o":true}';
    end if;
    delete from durable.fanout f where f.id = i_first.id;
    delete from durable.signal_key k where k.id = i_first.id;
    delete from durable.progress p where p.id = i_first.id;
    perform durable.append_lines(array[i_first.id],
        array[durable.line(i_first.id, v_seq + 1, i_first.workflow, v_step, v_type.version, v_state)]);
    perform durable.record('replay', array[i_first.id], i_actor, array[jsonb_build_object('workflow', i_first.workflow)]);
    return true;
end
$$;

-- durable.start_by_name(workflow, input, key, after, attributes): as durable.start, for whoever knows the workflow's name alone: it begins
-- as the code that ran here last says it does. Result: the id (whole), and whether it is new.
-- Errors: DC006 for a workflow that no code has declared here; DC002; 40001 (a snapshot older than a rotation). Tables: see durable.start.
create or replace function durable.start_by_name(i_workflow text, i_input text default 'null', i_key text default null,
    i_after interval default null, i_attributes text default null, out id uuid, out is_new boolean)
language plpgsql security definer
set search_path = pg_catalog, durable, pg_temp
as $$
declare
    v_type durable.workflow_type := durable.type_of(durable.checked_name('workflow', i_workflow));
begin
    select s.id, s.is_new into start_by_name.id, start_by_name.is_new
    from durable.start(i_workflow, v_type.version, v_type.step, i_input, i_key, i_after, i_attributes) s;
end
$$;

-- durable.replay_refusal(id): why a live workflow cannot be replayed now; null: it can.
create or replace function durable.replay_refusal(i_id uuid) returns text
language plpgsql stable
set search_path = pg_catalog, durable, pg_temp
as $$
declare
    v_short text := durable.short(i_id);
    v_living bigint;
begin
    if not exists (select from durable.dead_letter d where d.id = i_id) then
        return format('workflow %s… goes on by itself; cancel it first, and replay it when it has ended: ''durable-cluster cancel %s''',
            v_short, v_short);
    elsif exists (select from durable.cancelled c where c.id = i_id) then
        return format('workflow %s… was cancelled and is stuck in its cleanup; retry or purge its dead letter first, and replay it when it has ended',
            v_short);
    end if;
    select count(*) into v_living from (
        select from durable.started s where s.parent = i_id
            and not exists (select from durable.finished f where f.id = s.id and f.day = s.day) limit 1001) c;
    if v_living > 0 then
        return format('%s children of workflow %s… live, and would be there beside new ones; cancel them first'
            ' (''durable-cluster list --parent %s'' names them), or retry it, which keeps them',
            case when v_living > 1000 then 'more than 1000' else v_living::text end, v_short, v_short);
    end if;
    return null;
end
$$;

-- durable.replay(id, actor): start over: a stuck workflow itself, with the same id; of one that has ended a new one with its input and
-- attributes, and no key. Either as the code that runs now says it begins.
-- Result: the id, and whether that is new. Errors: DC003 for an unknown id; DC006 for one that goes on by itself, that has children alive,
-- or that no code knows; DC002; 40001 (a snapshot older than a rotation). Tables: see durable.start_over, durable.start_from.
create or replace function durable.replay(i_id uuid, i_actor text default null, out id uuid, out is_new boolean)
language plpgsql security definer
set search_path = pg_catalog, durable, pg_temp
as $$
declare
    v_first durable.started := durable.demand_started(i_id);
    v_type durable.workflow_type := durable.type_of(v_first.workflow);
    v_refusal text;
begin
    perform durable.checked_label('actor', i_actor, 255);
    id := i_id;
    is_new := not durable.is_live(i_id);
    if is_new then
        id := durable.start_from(v_first, 'replay', v_type.version, v_type.step, v_first.input, v_first.input, '', i_actor);
        return;
    end if;
    v_refusal := durable.replay_refusal(i_id);
    perform durable.demand_plain(i_id, v_first.input);
    if v_refusal is null and not durable.start_over(v_first, i_actor) then
        v_refusal := format('workflow %s… is not stuck any more: somebody retried, replayed or purged it at this moment', durable.short(i_id));
    end if;
    if v_refusal is not null then
        raise exception '%', v_refusal using errcode = 'DC006';
    end if;
end
$$;

-- durable.replay_many(…), durable.fork_many(…): as replay and fork, for those that match, newest first, i_limit a call; page on with the cursor
-- until there is none. What it would be: durable.list and durable.list_total with the same filters.
-- Result: how many were, how many could not be and why the first of them, and where to go on. Locks: their dead letters, in one order.
create or replace function durable.again_many(i_what text, i_at text, i_input text, i_workflow text, i_status text, i_limit int,
    i_after text, i_attributes text, i_from timestamptz, i_to timestamptz, i_parent text, i_key text, i_origin text, i_actor text,
    out done int, out refused int, out refusal text, out cursor text)
language plpgsql
set search_path = pg_catalog, durable, pg_temp
as $$
declare
    v_one uuid;
    v_ids uuid[];
begin
    execute 'select array_agg(w.id), min(durable.cursor_of(w.at, durable.short(w.id))) filter (where w.is_last) from ('
        ' select w.id, w.at, row_number() over (order by w.at, durable.short(w.id)) = 1 as is_last from ('
        || durable.list_query(i_workflow, i_status, i_after, durable.checked_attributes(i_attributes), i_from, i_to, i_parent, i_key, i_origin)
        || ') w) w'
        into v_ids, cursor
        using i_workflow, i_limit, i_after, durable.checked_attributes(i_attributes), i_from, i_to, durable.first_digits(i_parent), i_key,
            i_status, durable.day_at(durable.cursor_at(i_after)), durable.day_at(i_from), durable.day_at(i_to), durable.first_digits(i_origin);
    perform from durable.dead_letter d where d.id = any (v_ids) order by d.id, d.seq for update;
    done := 0;
    refused := 0;
    foreach v_one in array coalesce(v_ids, '{}') loop
        begin
            if i_what = 'replay' then
                perform durable.replay(v_one, i_actor);
            else
                perform durable.fork(v_one, i_at, i_input, i_actor);
            end if;
            done := done + 1;
        exception when sqlstate 'DC002' or sqlstate 'DC003' or sqlstate 'DC006' then
            refused := refused + 1;
            refusal := coalesce(refusal, sqlerrm);
        end;
    end loop;
end
$$;

create or replace function durable.replay_many(i_workflow text default null, i_status text default null, i_limit int default 100,
    i_after text default null, i_attributes text default null, i_from timestamptz default null, i_to timestamptz default null,
    i_parent text default null, i_key text default null, i_origin text default null, i_actor text default null,
    out done int, out refused int, out refusal text, out cursor text)
language sql volatile security definer
set search_path = pg_catalog, durable, pg_temp
as $$
    select * from durable.again_many('replay', null, null, i_workflow, i_status, least(i_limit, 1000), i_after, i_attributes, i_from, i_to,
        i_parent, i_key, i_origin, i_actor)
$$;

create or replace function durable.fork_many(i_at text, i_input text, i_workflow text, i_status text default null, i_limit int default 100,
    i_after text default null, i_attributes text default null, i_from timestamptz default null, i_to timestamptz default null,
    i_parent text default null, i_key text default null, i_origin text default null, i_actor text default null,
    out done int, out refused int, out refusal text, out cursor text)
language sql volatile security definer
set search_path = pg_catalog, durable, pg_temp
as $$
    select * from durable.again_many('fork', i_at, i_input, i_workflow, i_status, least(i_limit, 1000), i_after, i_attributes, i_from, i_to,
        i_parent, i_key, i_origin, i_actor)
$$;
