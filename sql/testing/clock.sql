-- A clock that stands still until it is moved: in place of clock.sql's, in databases that the testing kit made. No other database has
-- what is in this file, and an installation that is none of the kit's takes it out again.
-- A sequence holds the time, in microseconds since 1970: it is outside of snapshots, so every session sees at once that it was moved.
create sequence if not exists durable.test_clock;
select setval('durable.test_clock', (extract(epoch from clock_timestamp()) * 1000000)::bigint)
from durable.test_clock c where not c.is_called;

create or replace function durable.now() returns timestamptz
language sql volatile security definer
set search_path = pg_catalog, durable, pg_temp
as $$ select timestamptz 'epoch' + c.last_value * interval '1 microsecond' from durable.test_clock c $$;

-- durable.set_clock(time): from now on it is this time. Back only before anything has started: timers never go back. Errors: DC002.
create or replace function durable.set_clock(i_to timestamptz) returns void
language plpgsql
set search_path = pg_catalog, durable, pg_temp
as $$
begin
    if i_to is null or not isfinite(i_to) or i_to <= 'epoch' then
        raise exception 'the clock cannot show %; give a time after 1970', coalesce(i_to::text, 'null') using errcode = 'DC002';
    end if;
    if i_to < durable.now() then
        if exists (select from durable.started) then
            raise exception 'the clock shows %, and workflows have started: it cannot go back to %', durable.now(), i_to
                using errcode = 'DC002';
        end if;
        update durable.timer_control set reached_due = i_to;
    end if;
    perform setval('durable.test_clock', (extract(epoch from i_to) * 1000000)::bigint);
end
$$;
