-- Progress: what a workflow says of itself while it runs, the last word only. Nobody but pages and running steps write it.

-- durable.publish(ids, progress): of steps of one page, in its transaction, one of each a line. Tables: progress (a row each), in the
-- order of the ids. What somebody put into the log by hand, and belongs to no workflow, is passed over.
create or replace function durable.publish(i_ids text, i_progress text) returns void
language sql volatile security definer
set search_path = pg_catalog, durable, pg_temp
as $$
    with said as materialized (
        select q.id::uuid as id, q.progress
        from rows from (string_to_table(i_ids, E'\n'), string_to_table(i_progress, E'\n')) q(id, progress)
        where q.id ~ '^[0-9a-f]{32}$'
    )
    insert into durable.progress as p (id, progress, at)
    select s.id, s.progress, durable.now() from said s
    where exists (select from durable.started b where b.id = s.id and b.day = durable.day_of(s.id))
    order by s.id
    on conflict (id) do update set progress = excluded.progress, at = excluded.at
$$;

-- durable.publish_detached(owner, keys, progress): of detached steps while they run, as far as they are still this process's.
create or replace function durable.publish_detached(i_owner bigint, i_keys text, i_progress text) returns void
language sql volatile security definer
set search_path = pg_catalog, durable, pg_temp
as $$
    insert into durable.progress as p (id, progress, at)
    select d.id, q.progress, durable.now()
    from rows from (string_to_table(i_keys, E'\n'), string_to_table(i_progress, E'\n')) q(key, progress)
    join durable.detached d on d.id = split_part(q.key, ':', 1)::uuid and d.seq = split_part(q.key, ':', 2)::int and d.owner = i_owner
    order by d.id
    on conflict (id) do update set progress = excluded.progress, at = excluded.at
$$;

-- durable.progress_of(id): what a workflow last said, as JSON, and when; for who holds its id. A row, or none.
create or replace function durable.progress_of(i_id uuid) returns table (progress text, at timestamptz)
language sql stable security definer
set search_path = pg_catalog, durable, pg_temp
as $$ select p.progress, p.at from durable.progress p where p.id = i_id $$;
