-- durable.new_id(at): a capability: 12 bits of the time of day (21 s each), 100 random bits, 16 bits of its start day.
-- The time comes first, so that what starts together stands together in the indexes of a day: with random ids every start and every
-- end touches another page of them, and after each checkpoint writes it to the WAL as a whole. The random bits are those of a random
-- UUID without the two bytes that say which kind of UUID it is.
create or replace function durable.new_id(i_at timestamptz) returns uuid
language sql volatile
as $$
    select (lpad(to_hex(floor(extract(epoch from i_at) * 4096 / 86400)::bigint % 4096), 3, '0')
        || substr(encode(overlay(overlay(uuid_send(gen_random_uuid()) placing '' from 9 for 1) placing '' from 7 for 1), 'hex'), 4)
        || lpad(to_hex(floor(extract(epoch from i_at) / 86400)::int), 4, '0'))::uuid
$$;

-- durable.day_of(id): the start day an id carries.
create or replace function durable.day_of(i_id uuid) returns int
language sql immutable parallel safe
as $$ select get_byte(uuid_send(i_id), 14) * 256 + get_byte(uuid_send(i_id), 15) $$;

-- durable.hex(id): the 32 digits as people and programs pass them; durable.short(id): the 12 that may be shown.
create or replace function durable.hex(i_id uuid) returns text
language sql immutable parallel safe
as $$ select encode(uuid_send(i_id), 'hex') $$;

create or replace function durable.short(i_id uuid) returns text
language sql immutable parallel safe
as $$ select left(encode(uuid_send(i_id), 'hex'), 12) $$;

create or replace function durable.new_id() returns uuid
language sql volatile
as $$ select durable.new_id(durable.now()) $$;

-- durable.slot_of(id): one of 1,024 virtual slots; ten of the id's random bits are the hash.
create or replace function durable.slot_of(i_id uuid) returns int
language sql immutable parallel safe
as $$ select get_byte(uuid_send(i_id), 2) * 4 + get_byte(uuid_send(i_id), 3) / 64 $$;

-- durable.queue_of(shard), durable.consumer(): the names the engine knows a shard's log and its readers by.
create or replace function durable.queue_of(i_shard int) returns text
language sql immutable parallel safe
as $$ select 'durable_' || i_shard::text $$;

create or replace function durable.consumer_of(i_shard int) returns text
language sql immutable parallel safe
as $$ select 'durable_' || i_shard::text $$;

-- durable.lay_out(shards): creates the queues and the slot map of an empty database; on a laid-out one it demands the same number.
-- Tables: cluster, shard, slot (written once).
create or replace function durable.lay_out(i_shards int) returns void
language plpgsql
set search_path = pg_catalog, durable, pg_temp
as $$
declare
    v_shards int;
begin
    select c.shards into v_shards from durable.cluster c;
    if found then
        if v_shards <> i_shards then
            raise exception 'this database is laid out for % shards, not %; start with --shards %', v_shards, i_shards, v_shards
                using errcode = 'DC005';
        end if;
        return;
    end if;
    insert into durable.cluster (shards) values (i_shards);
    for n in 0 .. i_shards - 1 loop
        perform pgque.create_queue(durable.queue_of(n));
        perform pgque.set_queue_config(durable.queue_of(n), 'external_ticker', 'true');
        perform pgque.set_queue_config(durable.queue_of(n), 'rotation_period', '10 minutes');
        perform pgque.register_consumer(durable.queue_of(n), durable.consumer_of(n));
        insert into durable.shard (shard, queue, queue_id)
        select n, q.queue_name, q.queue_id from pgque.queue q where q.queue_name = durable.queue_of(n);
    end loop;
    insert into durable.slot (slot, shard) select s, s % i_shards from generate_series(0, 1023) s;
end
$$;
