-- A million workflows of 30 days, twenty types and one rare one, for the times in this folder's README. Into a fresh, installed database.
-- 98 in 100 are completed, 1 in 1,000 failed, 20 are stuck, 1 in 100 runs, all of those among the newest fifth; each has three attributes.
\set ON_ERROR_STOP on
\timing on
select sum(durable.add_day(t, durable.today() - d)) from unnest(array['started', 'finished']) t, generate_series(0, 30) d;
insert into durable.started (id, day, workflow, version, input, key, at)
select durable.new_id(q.at), floor(extract(epoch from q.at) / 86400)::int, q.workflow, 1, '{"order": 10248}', 'key ' || q.n, q.at
from (select n, now() - (1000000 - n) * interval '2.592 seconds' as at,
          case when n % 100003 = 5 then 'rare' else 'type_' || n % 20 end as workflow from generate_series(1, 1000000) n) q;
insert into durable.key (workflow, key, id) select workflow, key, id from durable.started;
create temp table numbered as select id, day, at, substr(key, 5)::int as n from durable.started;
insert into durable.attribute (id, attributes)
select id, jsonb_build_object('customer', 'c' || n % 50000, 'region', 'r' || n % 10, 'total', n % 1000) from numbered;
insert into durable.finished (id, day, status, output, at)
select id, day, case when n % 1000 = 7 then 'failed' when n % 5000 = 11 then 'cancelled' else 'completed' end, '1', at + interval '1 second'
from numbered where not (n > 800000 and n % 20 = 3) and n % 50000 <> 4;
insert into durable.dead_letter (id, seq, workflow, step, attempt, reason, details, line, at)
select id, 1, 'type_4', 's', 5, 'attempts', '{"reason": "no"}', '{}', at from numbered where n % 50000 = 4;
analyze numbered;
update durable.started s set (parent, parent_seq, number) = (select p.id, 1, c.n - 500 from numbered p where p.n = 17)
from numbered c where s.id = c.id and s.day = c.day and c.n between 500 and 1523;
vacuum analyze durable.started, durable.finished, durable.attribute, durable.key, durable.dead_letter;
