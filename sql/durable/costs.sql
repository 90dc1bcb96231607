-- What the types of workflows cost, for people, by samples of what is stored anyway: no step and no page pays for it.

-- durable.log_sample(shard): what the log of a shard still holds, by type, estimated from some of its blocks and entries. A row each for a
-- table and type, and one with a null type for a table as a whole.
--   entries        of the log, of the table as a whole, those for timelines too: as durable.log_entries counts
--   lines, bytes   step events; sampled: how many lines that rests on
--   since, until   the first and the last of what the table holds
-- Reads 48 blocks of each table and some 4,000 lines.
-- Hazard: the tables are locked while it reads, and a rotation that meets that is put off: one shard a call.
create or replace function durable.log_sample(i_shard int)
returns table (workflow text, entries float8, lines float8, bytes float8, sampled bigint, since timestamptz, until timestamptz)
language plpgsql volatile security definer
set search_path = pg_catalog, durable, pg_temp set jit = off
as $$
declare
    v_table text;
    v_blocks bigint;
begin
    for v_table in
        select q.queue_data_pfx || '_' || n from durable.shard s join pgque.queue q using (queue_id), generate_series(0, q.queue_ntables - 1) n
        where s.shard = i_shard
    loop
        v_blocks := pg_relation_size(v_table::regclass) / current_setting('block_size')::int;
        continue when v_blocks = 0;
        return query execute format($sql$
            with picked as materialized (
                select e.ev_data, random() as chance,
                    case when e.ev_type = 'history' then 0 when e.ev_extra1 ~ '^[0-9]{1,6}$' then e.ev_extra1::int else 1 end as n
                from %1$s e tablesample system (least(100, 4800.0 / $1))
            ), part as materialized (
                select count(*) as entries, least(1, 48 / $1::float8) as of_blocks,
                    least(1, 4000 / greatest(sum(p.n), 1)::float8) as of_entries
                from picked p
            ), line as (
                select durable.head_of(l.line, 'f') as workflow, octet_length(l.line) as size
                from picked p cross join part q, string_to_table(p.ev_data, E'\n') l(line) where p.n > 0 and p.chance < q.of_entries
            )
            select l.workflow, case when grouping(l.workflow) = 1 then (select q.entries / q.of_blocks from part q) end,
                count(*) / (select q.of_entries * q.of_blocks from part q),
                coalesce(sum(l.size), 0) / (select q.of_entries * q.of_blocks from part q), count(*),
                (select e.ev_time from %1$s e order by e.ev_txid, e.ev_id limit 1),
                (select e.ev_time from %1$s e order by e.ev_txid desc, e.ev_id desc limit 1)
            from line l group by grouping sets ((l.workflow), ()) $sql$, v_table)
            using v_blocks;
    end loop;
end
$$;

-- durable.log_entries(): entries appended to the logs so far, ever: one for the step events that a commit handed on to a shard, one for what it
-- recorded for timelines. durable.log_sample says how many step events an entry has.
create or replace function durable.log_entries() returns bigint
language sql stable security definer
set search_path = pg_catalog, durable, pg_temp
as $$
    select coalesce(sum(pg_sequence_last_value(q.queue_event_seq::regclass)), 0)::bigint
    from durable.shard s join pgque.queue q using (queue_id)
$$;

-- durable.kept_sample(): what is kept of workflows, by type, estimated from a sample of blocks: how many started, how many of those have not
-- ended, bytes of inputs, of outputs and of what linear workflows had on record. sampled: how many that rests on.
create or replace function durable.kept_sample()
returns table (workflow text, workflows float8, living float8, input_bytes float8, output_bytes float8, sampled bigint)
language plpgsql volatile security definer
set search_path = pg_catalog, durable, pg_temp set enable_partitionwise_join = on set jit = off
as $$
declare
    v_blocks bigint := (select sum(pg_relation_size(i.inhrelid)) / current_setting('block_size')::int
                        from pg_inherits i where i.inhparent = 'durable.started'::regclass);
    v_part float8 := least(1, 250 / greatest(v_blocks, 1)::float8);
begin
    return query
        select s.workflow, count(*) / v_part, count(*) filter (where f.id is null) / v_part, sum(pg_column_size(s.input)) / v_part,
            coalesce(sum(pg_column_size(f.output) + coalesce(pg_column_size(f.memo), 0)), 0) / v_part, count(*)
        from durable.started s tablesample system (v_part * 100)
        left join durable.finished f on f.id = s.id and f.day = s.day
        group by 1 order by 2 desc, 1 limit 1000;
end
$$;
