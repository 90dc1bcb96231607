-- Pause and resume of a workflow, of a type of workflows, and of a shard. A page that meets a step event of what is paused puts it
-- aside, under a share lock on the row of the pause: a resume deletes that row first, so it finds what was put aside, or who would put
-- aside finds the row gone. Signals and cancels are delivered meanwhile; timers fire; steps that run go on to their end.

-- durable.checked_scope(scope, name): the name as the tables have it, else DC002; DC003 for an id that is unknown or has ended.
create or replace function durable.checked_scope(i_scope text, i_name text) returns text
language plpgsql stable
set search_path = pg_catalog, durable, pg_temp
as $$
begin
    case i_scope
        when 'type' then
            return durable.checked_name('workflow', i_name);
        when 'shard' then
            if not exists (select from durable.shard s where s.shard::text = i_name) then
                raise exception 'shard % does not exist; this database has shards 0 to %', i_name,
                    (select max(s.shard) from durable.shard s) using errcode = 'DC002';
            end if;
            return i_name;
        when 'workflow' then
            if i_name !~ '^[0-9a-f]{8}-?([0-9a-f]{4}-?){3}[0-9a-f]{12}$' or not durable.is_live(i_name::uuid) then
                raise exception 'no live workflow with the id %…', left(i_name, 12) using errcode = 'DC003';
            end if;
            return durable.hex(i_name::uuid);
        else
            raise exception 'a % cannot be paused; a workflow, a type or a shard can', coalesce(quote_literal(left(i_scope, 80)), 'null')
                using errcode = 'DC002';
    end case;
end
$$;

-- durable.id_or_null(digits): the id of 32 digits; null for the name of a type.
create or replace function durable.id_or_null(i_digits text) returns uuid
language sql immutable
as $$ select case when i_digits ~ '^[0-9a-f]{32}$' then i_digits::uuid end $$;

-- durable.pause(scope, name, actor): from the next page on no step of it runs. Whether that is new.
--   i_scope  'workflow' (i_name: its whole id), 'type' (its name) or 'shard' (its number)
-- Errors: DC002, DC003. Tables: pause (a row) or shard (a row changed).
create or replace function durable.pause(i_scope text, i_name text, i_actor text default null) returns boolean
language plpgsql security definer
set search_path = pg_catalog, durable, pg_temp
as $$
declare
    v_name text := durable.checked_scope(i_scope, i_name);
    v_is_new boolean;
begin
    perform durable.checked_label('actor', i_actor, 255);
    if i_scope = 'shard' then
        update durable.shard s set is_paused = true where s.shard::text = v_name and not s.is_paused;
    else
        insert into durable.pause (scope, name, actor, at) values (i_scope, v_name, i_actor, durable.now()) on conflict do nothing;
    end if;
    v_is_new := found;
    if v_is_new then
        perform durable.record_scope('pause', i_scope, v_name, i_actor);
    end if;
    return v_is_new;
end
$$;

-- durable.record_scope(what, scope, name, actor): into the audit, without a whole id.
create or replace function durable.record_scope(i_what text, i_scope text, i_name text, i_actor text) returns void
language sql volatile
set search_path = pg_catalog, durable, pg_temp
as $$
    select durable.record(i_what, array[durable.id_or_null(i_name)], i_actor,
        array[case i_scope when 'workflow' then '{}' else jsonb_build_object(i_scope, i_name) end])
$$;

-- durable.resume(scope, name, actor): takes a pause back: what was put aside goes to the end of the log. How many step events; null: it was not
-- paused. What another pause holds too is put aside again by the page that meets it. Tables: pause, parked (rows deleted), the logs.
create or replace function durable.resume(i_scope text, i_name text, i_actor text default null) returns int
language plpgsql security definer
set search_path = pg_catalog, durable, pg_temp
as $$
declare
    v_name text := durable.checked_scope(i_scope, i_name);
    v_ids uuid[];
    v_lines text[];
begin
    if i_scope = 'shard' then
        update durable.shard s set is_paused = false where s.shard::text = v_name and s.is_paused;
        if not found then
            return null;
        end if;
        perform durable.record_scope('resume_pause', i_scope, v_name, i_actor);
        perform pg_notify(durable.queue_of(v_name::int), '');
        return 0;
    end if;
    delete from durable.pause p where p.scope = i_scope and p.name = v_name;
    if not found then
        return null;
    end if;
    perform durable.record_scope('resume_pause', i_scope, v_name, i_actor);
    -- A later statement than the one that waited for pages which were putting aside.
    with gone as (
        delete from durable.parked p
        where case i_scope when 'type' then p.workflow = v_name else p.id = durable.id_or_null(v_name) end
        returning p.id, p.line
    )
    select array_agg(g.id), array_agg(g.line) into v_ids, v_lines from gone g;
    perform durable.append_lines(v_ids, v_lines);
    return coalesce(cardinality(v_ids), 0);
end
$$;

-- durable.park(ids, seqs, workflows, lines): step events of one page that met a pause, in its transaction, one of each a line. What is
-- paused no more, or cancelled, goes back to the log at once. Locks: the stripes, then the rows of the pauses. Tables: parked, the logs.
create or replace function durable.park(i_ids text, i_seqs text, i_workflows text, i_lines text) returns void
language plpgsql security definer
set search_path = pg_catalog, durable, pg_temp
as $$
declare
    v_ids uuid[] := string_to_array(i_ids, E'\n');
    v_workflows text[] := string_to_array(i_workflows, E'\n');
    v_back_ids uuid[];
    v_back_lines text[];
begin
    perform durable.lock_stripes(v_ids);
    perform from durable.pause p
    where (p.scope = 'workflow' and p.name in (select durable.hex(i) from unnest(v_ids) i)) or (p.scope = 'type' and p.name = any (v_workflows))
    order by p.scope, p.name for share;
    with met as (
        select q.*, durable.is_paused(q.id, q.workflow) and not exists (select from durable.cancelled c where c.id = q.id) as stays
        from rows from (unnest(v_ids), string_to_table(i_seqs, E'\n'), unnest(v_workflows), string_to_table(i_lines, E'\n'))
            with ordinality q(id, seq, workflow, line, o)
    ), kept as (
        insert into durable.parked (id, seq, workflow, line, since)
        select m.id, m.seq::int, m.workflow, m.line, durable.now() from met m where m.stays
        -- The same step twice can only have been put into the log by hand: that must not stop its page.
        on conflict do nothing
    )
    select array_agg(m.id order by m.o), array_agg(m.line order by m.o) into v_back_ids, v_back_lines from met m where not m.stays;
    perform durable.append_lines(v_back_ids, v_back_lines);
end
$$;

-- durable.is_paused(id, workflow): whether a pause holds the steps of this workflow, which is of that type.
create or replace function durable.is_paused(i_id uuid, i_workflow text) returns boolean
language sql stable
set search_path = pg_catalog, durable, pg_temp
as $$
    select exists (select from durable.pause p where p.scope = 'workflow' and p.name = durable.hex(i_id))
        or exists (select from durable.pause p where p.scope = 'type' and p.name = i_workflow)
$$;

-- durable.paused_in(bodies): what is paused of the workflows in these events, as a field of a page's head; else nothing.
create or replace function durable.paused_in(i_bodies text[]) returns text
language plpgsql stable
set search_path = pg_catalog, durable, pg_temp
as $$
begin
    if not exists (select from durable.pause) then
        return '';
    end if;
    return ',"paused":' || coalesce((
        select json_agg(p.name) from durable.pause p
        where p.scope = 'type' or p.name in (
            select substr(l.line, 7, 32) from unnest(i_bodies) b, string_to_table(b, E'\n') l(line))), '[]');
end
$$;

-- durable.pauses(): what is paused, the oldest first; ids are truncated. parked: step events that wait, counted up to 100,001.
create or replace function durable.pauses() returns table (scope text, name text, actor text, at timestamptz, parked bigint)
language sql stable security definer
set search_path = pg_catalog, durable, pg_temp
as $$
    select p.scope, case p.scope when 'workflow' then left(p.name, 12) else p.name end, p.actor, p.at,
        -- Two counts: a condition that asks for the scope, too, would go by no index.
        case p.scope
            when 'type' then (select count(*) from (select from durable.parked k where k.workflow = p.name limit 100001) k)
            else (select count(*) from (select from durable.parked k where k.id = durable.id_or_null(p.name) limit 100001) k)
        end
    from durable.pause p
    union all
    select 'shard', s.shard::text, null, null, null from durable.shard s where s.is_paused
    order by 4 nulls last, 1, 2
$$;
