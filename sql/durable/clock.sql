-- durable.now(): the one clock. Nothing sets it, but in databases that the testing kit made: see testing/clock.sql.
create or replace function durable.now() returns timestamptz
language sql volatile parallel safe
as $$ select clock_timestamp() $$;
drop sequence if exists durable.test_clock;

-- durable.today(): the UTC day in days since 1970.
create or replace function durable.today() returns int
language sql volatile
as $$ select floor(extract(epoch from durable.now()) / 86400)::int $$;

-- durable.day_at(time): the same of another time, as far as ids can say one.
create or replace function durable.day_at(i_at timestamptz) returns int
language sql stable
as $$ select floor(least(greatest(extract(epoch from i_at) / 86400, 0), 65535))::int $$;

-- durable.demand_read_committed(): raises elsewhere. An older snapshot must never be stored under a newer tick.
create or replace function durable.demand_read_committed() returns void
language plpgsql
set search_path = pg_catalog, durable, pg_temp
as $$
begin
    if current_setting('transaction_isolation') <> 'read committed' then
        raise exception 'durable: this call needs READ COMMITTED, the transaction is %; set it and try again',
            upper(current_setting('transaction_isolation')) using errcode = 'DC004';
    end if;
end
$$;
