-- Priority: a weight, 1 for a workflow of which nothing else is said. Where a page holds steps of several weights, or a heavier workflow
-- is ready behind a backlog of more than a page, each lighter step goes to the end of the log as it is, but for its share: a step of
-- weight 1 beside one of 4 runs one time in four. Nothing starves, and a page of equals pays nothing.

-- durable.set_priority(ids, weight): of live workflows (a line each); from their next steps on. How many live. Errors: DC002.
-- Tables: priority (a row each, none for a weight of 1), queued (changed, of those that wait for a permit).
create or replace function durable.set_priority(i_ids text, i_weight float8) returns int
language plpgsql security definer
set search_path = pg_catalog, durable, pg_temp
as $$
declare
    v_ids uuid[] := array(select i::uuid from string_to_table(i_ids, E'\n') i where durable.is_live(i::uuid) order by 1);
begin
    if i_weight is null or i_weight not between 0.1 and 10 then
        raise exception 'a priority of % is out of range; it is a weight from 0.1 to 10, and 1 is usual', coalesce(i_weight::text, 'null')
            using errcode = 'DC002';
    end if;
    if i_weight = 1 then
        delete from durable.priority p where p.id = any (v_ids);
    else
        insert into durable.priority (id, weight) select i, i_weight from unnest(v_ids) i
        on conflict (id) do update set weight = excluded.weight;
    end if;
    perform durable.record('set_priority', v_ids, null, array_fill(jsonb_build_object('weight', i_weight), array[cardinality(v_ids)]));
    update durable.queued q set weight = i_weight where q.id = any (v_ids);
    return cardinality(v_ids);
end
$$;

-- durable.weight_of(id): the weight of a workflow.
create or replace function durable.weight_of(i_id uuid) returns float8
language sql stable
set search_path = pg_catalog, durable, pg_temp
as $$ select coalesce((select p.weight from durable.priority p where p.id = i_id), 1) $$;

-- durable.weights_in(shard, bodies, is_last): the weights of the workflows in these events, as a field of a page's head; and where more
-- than this page waits, that of the heaviest which is ready behind it. Nothing while no workflow has a weight of its own.
create or replace function durable.weights_in(i_shard int, i_bodies text[], i_is_last boolean) returns text
language plpgsql stable
set search_path = pg_catalog, durable, pg_temp
as $$
begin
    if not exists (select from durable.priority) then
        return '';
    end if;
    return ',"weights":' || coalesce((
            select json_object_agg(durable.hex(p.id), p.weight) from durable.priority p
            where p.id in (select substr(l.line, 7, 32)::uuid from unnest(i_bodies) b, string_to_table(b, E'\n') l(line)
                           where l.line ~ '^\{"w":"[0-9a-f]{32}"')), '{}')
        || case when i_is_last then '' else ',"heaviest":' || coalesce((
            select p.weight from (select k.id, k.weight from durable.priority k order by k.weight desc limit 100) p
            join durable.slot s on s.slot = durable.slot_of(p.id)
            where s.shard = i_shard and not exists (select from durable.wait w where w.id = p.id)
                and not exists (select from durable.detached d where d.id = p.id)
                and not exists (select from durable.parked k where k.id = p.id)
            order by p.weight desc limit 1), 1) end;
end
$$;
