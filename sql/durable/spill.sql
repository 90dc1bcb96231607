-- What linear workflows have on record and do not carry (cluster/memo.py): the chunks of their memos, of which a step event names the
-- last. Rows are only ever inserted, in the transaction that hands that step event on. A row says what the workflow's memo has as its
-- chunk of this number; with it, all older rows of the workflow with this number or a higher one count no more. That is all that tells
-- garbage while a workflow lives; once it has ended, all of its rows are.
-- Readers look at all three tables, so a writer whose idea of the current one is old does no harm.

-- durable.put_chunks(rows): one a line: the workflow's id, the number (8 hex digits), the ref (16), the chunk; without a chunk the memo ends
-- before that number. In the transaction of their step events. Tables: the current spill table (one row a line).
-- Lines without such a head belong to no workflow: somebody has put a step event into the log by hand.
-- Hazard: a plan that names all three tables would lock them for the whole transaction, and rotation would starve.
create or replace function durable.put_chunks(i_rows text) returns void
language plpgsql
set search_path = pg_catalog, durable, pg_temp
as $$
begin
    execute 'insert into durable.spill_' || (select c.current from durable.spill_control c) || ' (id, number, ref, body)'
        ' select left(r, 32)::uuid, (''x'' || substr(r, 33, 8))::bit(32)::int, (''x'' || substr(r, 41, 16))::bit(64)::bigint,'
        ' nullif(substr(r, 57), '''')'
        ' from string_to_table($1, E''\n'') r where left(r, 56) ~ ''^[0-9a-f]{56}$''' using i_rows;
end
$$;

-- durable.chunks_of(id, ref): the chunks of a memo as it was when that one was its last, in order; nothing if it is not there.
-- Volatile, so that each statement in it takes its snapshot after it has locked the tables: a rotation empties one of them, and what it
-- has carried from there is new to an older snapshot. Where the isolation level forbids that, the caller finds rows missing, and asks again.
create or replace function durable.chunks_of(i_id uuid, i_ref bigint) returns table (ref bigint, body text)
language plpgsql volatile security definer
set search_path = pg_catalog, durable, pg_temp set plan_cache_mode = force_generic_plan
set enable_seqscan = off set enable_bitmapscan = off
as $$
#variable_conflict use_column
begin
    return query
        select q.ref, q.body
        from (select s.number, s.ref, s.body,
                  min(s.number) over (order by s.at desc rows between unbounded preceding and 1 preceding) as cut
              from durable.spill s
              where s.id = i_id and s.at <= (select max(l.at) from durable.spill l where l.id = i_id and l.ref = i_ref)) q
        where q.number < coalesce(q.cut, q.number + 1) and q.body is not null
        order by q.number;
end
$$;

-- durable.needs_spill_rotation(): whether it is worth it: there are 16 MiB or more, and of a sample at least half of the bytes is
-- garbage. So a rotation copies no more than it frees, and what lives on is not copied for nothing. Reads a few pages of each table.
-- An estimate: of a living workflow only what its newest row says is known to be garbage.
create or replace function durable.needs_spill_rotation() returns boolean
language plpgsql stable security definer
set search_path = pg_catalog, durable, pg_temp
as $$
declare
    v_bytes_min constant bigint := 16777216;
    v_pages constant int := 8;
    v_table regclass;
    v_all bigint;
    v_garbage bigint;
    v_all_sum float8 := 0;
    v_garbage_sum float8 := 0;
    v_share float8;
begin
    if durable.spill_bytes() < v_bytes_min then
        return false;
    end if;
    foreach v_table in array array['durable.spill_0', 'durable.spill_1', 'durable.spill_2']::regclass[] loop
        v_share := least(1, v_pages / greatest(1, pg_relation_size(v_table) / 8192.0));
        execute format('select coalesce(sum(q.bytes), 0), coalesce(sum(q.bytes) filter (where q.is_garbage), 0) from ('
            'select 64 + coalesce(pg_column_size(s.body), 0) as bytes, not durable.is_live(s.id) or exists ('
            'select from (select n.at, n.number from durable.spill n where n.id = s.id order by n.at desc limit 1) n'
            ' where n.at > s.at and n.number <= s.number) as is_garbage'
            ' from %s s tablesample system (%s)) q', v_table, 100 * v_share) into v_all, v_garbage;
        v_all_sum := v_all_sum + v_all / v_share;
        v_garbage_sum := v_garbage_sum + v_garbage / v_share;
    end loop;
    return v_garbage_sum > 0 and v_garbage_sum * 2 >= v_all_sum;
end
$$;

-- durable.spill_bytes(): how large the tables are, with their indexes.
create or replace function durable.spill_bytes() returns bigint
language sql volatile security definer
set search_path = pg_catalog, durable, pg_temp
as $$
    select pg_total_relation_size('durable.spill_0') + pg_total_relation_size('durable.spill_1') + pg_total_relation_size('durable.spill_2')
$$;

-- durable.rotate_spill(): makes the empty table the current one, carries what still counts of the oldest into it, and empties that. How
-- many rows were carried; -1 when somebody holds a lock. Garbage of the current table goes with the rotation after.
-- Tables: spill_control (one row updated), the three spill tables.
-- Hazards: the oldest table's writers are locked out first, and its rows read in a later statement, so that none in flight is truncated
-- unseen. Its readers may go on until the truncate, which waits for them a fifth of a second and then gives up: who waits for that lock
-- lets nobody else pass. A workflow that is not seen to have ended is carried once more; one that has not ended is always seen.
create or replace function durable.rotate_spill() returns int
language plpgsql security definer
set search_path = pg_catalog, durable, pg_temp
as $$
declare
    v_current int;
    v_next text;
    v_oldest text;
    v_carried int;
begin
    perform durable.demand_read_committed();
    select c.current into v_current from durable.spill_control c where c.one for update skip locked;
    if not found then
        return -1;
    end if;
    v_next := 'durable.spill_' || (v_current + 1) % 3;
    v_oldest := 'durable.spill_' || (v_current + 2) % 3;
    perform set_config('lock_timeout', '200', true);
    begin
        execute 'lock table ' || v_oldest || ' in share row exclusive mode nowait';
        execute 'with living as materialized ('
            ' select i.id from (select distinct o.id from ' || v_oldest || ' o) i where durable.is_live(i.id)'
            '), counting as ('
            ' select q.id, q.at from ('
            '  select s.id, s.at, s.number, min(s.number) over ('
            '   partition by s.id order by s.at desc rows between unbounded preceding and 1 preceding) as cut'
            '  from durable.spill s join living l on l.id = s.id) q'
            ' where q.number < coalesce(q.cut, q.number + 1))'
            ' insert into ' || v_next || ' (id, number, ref, at, body)'
            ' select o.id, o.number, o.ref, o.at, o.body from ' || v_oldest || ' o join counting c on c.id = o.id and c.at = o.at';
        get diagnostics v_carried = row_count;
        execute 'truncate ' || v_oldest;
    exception when lock_not_available then
        return -1;
    end;
    update durable.spill_control c set current = (v_current + 1) % 3 where c.one;
    return v_carried;
end
$$;
