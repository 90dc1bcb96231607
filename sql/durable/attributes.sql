-- Attributes: what workflows are found by. They begin with a start, in its transaction; afterwards only pages write them: for their
-- steps, with the handoff, and for clients, whose change is a line of the log. So nobody who holds a transaction open holds up a page.

-- durable.are_attributes(json): a flat object of at most 32 strings, numbers, booleans and nulls, with keys that are names, in 4 KiB.
-- Numbers below 1e300, which every client's language can read.
create or replace function durable.are_attributes(i_json jsonb) returns boolean
language plpgsql immutable
set search_path = pg_catalog, durable, pg_temp
as $$
begin
    return jsonb_typeof(i_json) = 'object' and octet_length(i_json::text) <= 4096
        and (select count(*) <= 32 and coalesce(bool_and(e.key ~ '^[a-zA-Z0-9_.-]{1,57}$' and case jsonb_typeof(e.value)
                when 'number' then abs((e.value #>> '{}')::numeric) < 1e300 else jsonb_typeof(e.value) in ('string', 'boolean', 'null') end), true)
             from jsonb_each(i_json) e);
end
$$;

-- durable.checked_attributes(text): the same as jsonb, else DC002.
create or replace function durable.checked_attributes(i_attributes text) returns jsonb
language plpgsql immutable strict
set search_path = pg_catalog, durable, pg_temp
as $$
declare
    v_attributes jsonb;
begin
    v_attributes := i_attributes;
    if durable.are_attributes(v_attributes) then
        return v_attributes;
    end if;
    raise exception 'attributes are one flat JSON object: at most 32 keys of [a-zA-Z0-9_.-], 1 to 57 characters, with strings, numbers,'
        ' booleans or null, in 4096 bytes (these have %)', octet_length(v_attributes::text) using errcode = 'DC002';
exception when data_exception or program_limit_exceeded then
    raise exception 'the attributes are not JSON: %', sqlerrm using errcode = 'DC002';
end
$$;

-- durable.keep_attributes(ids, attributes): those of workflows that begin in this transaction; empty or null ones leave no row.
create or replace function durable.keep_attributes(i_ids uuid[], i_attributes jsonb[]) returns void
language plpgsql
set search_path = pg_catalog, durable, pg_temp
as $$
begin
    insert into durable.attribute (id, attributes)
    select q.id, jsonb_strip_nulls(q.attributes) from unnest(i_ids, i_attributes) q(id, attributes)
    where jsonb_strip_nulls(q.attributes) <> '{}';
end
$$;

-- durable.merge_attributes(ids, changes): changes of one page, in its transaction, one of each a line: null takes a key away.
-- Result: the ids whose attributes would be too many or too large, and stay as they are. Tables: attribute (a row each), in the order
-- of the ids. A line that somebody put into the log by hand, of no workflow or not of this form, must not stop the page.
create or replace function durable.merge_attributes(i_ids text, i_changes text) returns text
language plpgsql security definer
set search_path = pg_catalog, durable, pg_temp
as $$
declare
    v_refused text;
begin
    with said as materialized (
        select q.id::uuid as id, q.change::jsonb as change
        from rows from (string_to_table(i_ids, E'\n'), string_to_table(i_changes, E'\n')) q(id, change)
        where q.id ~ '^[0-9a-f]{32}$'
    ), known as materialized (
        select s.id, s.change from said s
        where exists (select from durable.started b where b.id = s.id and b.day = durable.day_of(s.id))
    ), written as (
        insert into durable.attribute as a (id, attributes)
        select k.id, jsonb_strip_nulls(k.change) from known k where durable.are_attributes(k.change) order by k.id
        on conflict (id) do update
        set attributes = jsonb_strip_nulls(a.attributes || (select k.change from known k where k.id = a.id))
        where durable.are_attributes(jsonb_strip_nulls(a.attributes || (select k.change from known k where k.id = a.id)))
        returning a.id
    )
    select string_agg(durable.hex(k.id), E'\n') into v_refused from known k where k.id not in (select w.id from written w);
    return coalesce(v_refused, '');
end
$$;

-- durable.set_attributes(id, attributes, actor): changes those of a workflow, in the caller's transaction, at any isolation level: the
-- given keys, null takes one away. Seen once a cluster has come by. A workflow that has ended keeps its attributes and may get others.
-- Errors: DC003 for an unknown id; DC002; 40001 (a snapshot older than a rotation). Tables: the shard's log (one event).
create or replace function durable.set_attributes(i_id uuid, i_attributes text, i_actor text default null) returns void
language plpgsql security definer
set search_path = pg_catalog, durable, pg_temp
as $$
declare
    v_change jsonb := durable.checked_attributes(i_attributes);
    v_known jsonb := coalesce((select a.attributes from durable.attribute a where a.id = i_id), '{}');
begin
    perform durable.checked_label('actor', i_actor, 255);
    if not exists (select from durable.started s where s.id = i_id and s.day = durable.day_of(i_id)) then
        raise exception 'no workflow with the id %…', durable.short(i_id) using errcode = 'DC003';
    end if;
    if v_change is null or not durable.are_attributes(jsonb_strip_nulls(v_known || v_change)) then
        raise exception 'workflow %… would have more than 32 attributes, or more than 4096 bytes of them; take some away with null',
            durable.short(i_id) using errcode = 'DC002';
    end if;
    perform durable.append_lines(array[i_id], array[durable.line(i_id, 1, '@attributes', 'set', 0, v_change::text)]);
    perform durable.record('set_attributes', array[i_id], i_actor,
        array[jsonb_build_object('keys', (select jsonb_agg(k order by k) from jsonb_object_keys(v_change) k))]);
end
$$;

-- durable.attributes_of(id): those of a workflow, for who holds its id; {} if it has none.
create or replace function durable.attributes_of(i_id uuid) returns jsonb
language sql stable security definer
set search_path = pg_catalog, durable, pg_temp
as $$ select coalesce((select a.attributes from durable.attribute a where a.id = i_id), '{}') $$;
