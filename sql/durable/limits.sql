-- Limits: how many at once, how many a period, by name and key. A step that needs a permit is put into durable.queued in its page's
-- transaction and comes back through the log with its permit. Whoever gives one back, in the transaction that hands on what held it,
-- lets the next pass: so counts are right across processes and hosts, and survive them.

-- durable.declare_limits(names, concurrencies, rates, periods): what the code says of them; nothing: no limit of that kind. Writes on change only.
create or replace function durable.declare_limits(i_names text[], i_concurrencies int[], i_rates int[], i_periods_ms float8[]) returns void
language sql volatile
set search_path = pg_catalog, durable, pg_temp
as $$
    insert into durable.limit_of as l (name, concurrency, rate, period_ms)
    select distinct on (q.name) q.* from unnest(i_names, i_concurrencies, i_rates, i_periods_ms) q(name, concurrency, rate, period_ms)
    where not exists (
        select from durable.limit_of k
        where k.name = q.name and (k.concurrency, k.rate, k.period_ms) is not distinct from (q.concurrency, q.rate, q.period_ms))
    order by q.name
    on conflict (name) do update set concurrency = excluded.concurrency, rate = excluded.rate, period_ms = excluded.period_ms
$$;

-- durable.keys_of(text): keys, a line each; an empty text is one empty key, which an array made of it would not have.
create or replace function durable.keys_of(i_text text) returns text[]
language sql immutable
as $$ select case when i_text = '' then array[''] else string_to_array(i_text, E'\n') end $$;

-- durable.lock_uses(names, keys): their counts until the transaction ends, in one order; made where there are none.
-- Hazard: a count that this waited for may have been swept meanwhile; who held no lock would wait in durable.queued for ever. So it is
-- made again until all are there.
create or replace function durable.lock_uses(i_names text[], i_keys text[]) returns void
language plpgsql
set search_path = pg_catalog, durable, pg_temp
as $$
declare
    v_wanted int := (select count(*) from (select distinct q.name, q.key from unnest(i_names, i_keys) q(name, key)) d);
begin
    loop
        insert into durable.limit_use (name, key)
        select distinct q.name, q.key from unnest(i_names, i_keys) q(name, key)
        where not exists (select from durable.limit_use u where u.name = q.name and u.key = q.key) order by 1, 2
        on conflict do nothing;
        exit when v_wanted = (
            select count(*) from (select from durable.limit_use u where (u.name, u.key) in (select * from unnest(i_names, i_keys))
                                  order by u.name, u.key for update) u);
    end loop;
end
$$;

-- durable.is_unused(use): nobody holds a permit, nobody waits for one, and the rate lets as many pass as ever: without its row a key is
-- the same. While a timer is to let the next pass, the row stays: it says that there is one.
create or replace function durable.is_unused(i_use durable.limit_use) returns boolean
language sql stable
set search_path = pg_catalog, durable, pg_temp
as $$
    select (i_use).used = 0 and (i_use).pump_at is null and (i_use).paid_until <= durable.timer_now()
        and not exists (select from durable.queued q where q.name = (i_use).name and q.key = (i_use).key)
$$;

-- durable.has_unused_limits(): whether counts are kept of keys that nobody uses. Reads only.
create or replace function durable.has_unused_limits() returns boolean
language sql stable security definer
set search_path = pg_catalog, durable, pg_temp
as $$
    select exists (select from durable.limit_use u where durable.is_unused(u))
$$;

-- durable.sweep_limits(max): deletes so many of those counts. How many went.
-- Locks: the counts, skipped when held. Hazard: who waits for a permit is looked for in a later statement than the lock was taken in; an
-- older snapshot would not see one who came in between, and whose count would be gone.
create or replace function durable.sweep_limits(i_max int default 10000) returns int
language plpgsql security definer
set search_path = pg_catalog, durable, pg_temp
as $$
declare
    v_names text[];
    v_keys text[];
    v_gone int;
begin
    perform durable.demand_read_committed();
    select array_agg(l.name), array_agg(l.key) into v_names, v_keys
    from (select u.name, u.key from durable.limit_use u where durable.is_unused(u)
          order by u.name, u.key limit i_max for update skip locked) l;
    delete from durable.limit_use u using unnest(v_names, v_keys) l(name, key)
    where u.name = l.name and u.key = l.key and durable.is_unused(u);
    get diagnostics v_gone = row_count;
    return v_gone;
end
$$;

-- durable.take_permits(…): steps of one page that need a permit, in its transaction, one of each a line.
--   i_ids, i_seqs, i_lines  the step event as it goes on with its permit
--   i_permit_seqs           0 for a permit of the workflow, else the step's number
--   i_names, i_keys, i_concurrencies, i_rates, i_periods_ms  the limit as the code declares it, and the key it is counted for
-- What is cancelled passes without. Locks: the stripes, then the counts. Tables: limit_of, limit_use, queued, permit, timers, the logs.
create or replace function durable.take_permits(i_ids text, i_seqs text, i_lines text, i_permit_seqs text, i_names text, i_keys text,
    i_concurrencies text, i_rates text, i_periods_ms text) returns void
language plpgsql security definer
set search_path = pg_catalog, durable, pg_temp
as $$
declare
    v_ids uuid[] := string_to_array(i_ids, E'\n');
    v_names text[] := string_to_array(i_names, E'\n');
    v_keys text[] := durable.keys_of(i_keys);
    v_past_ids uuid[];
    v_past_lines text[];
begin
    perform durable.lock_stripes(v_ids);
    perform durable.declare_limits(v_names, string_to_array(i_concurrencies, E'\n', '')::int[], string_to_array(i_rates, E'\n', '')::int[],
        string_to_array(i_periods_ms, E'\n', '')::float8[]);
    perform durable.lock_uses(v_names, v_keys);
    with met as (
        select q.*, exists (select from durable.cancelled c where c.id = q.id) as passes
        from rows from (unnest(v_ids), string_to_table(i_seqs, E'\n'), string_to_table(i_lines, E'\n'), string_to_table(i_permit_seqs, E'\n'),
            unnest(v_names), unnest(v_keys)) with ordinality q(id, seq, line, permit_seq, name, key, o)
    ), waiting as (
        insert into durable.queued (name, key, id, seq, permit_seq, line, weight)
        select m.name, m.key, m.id, m.seq::int, m.permit_seq::int, m.line, durable.weight_of(m.id) from met m where not m.passes order by m.o
    )
    select array_agg(m.id order by m.o), array_agg(m.line order by m.o) into v_past_ids, v_past_lines from met m where m.passes;
    perform durable.append_lines(v_past_ids, v_past_lines);
    perform durable.let_pass(v_names, v_keys);
end
$$;

-- durable.lock_ahead(names, keys, ids): before a page's first lock on a count: those counts, and those of the permits of these workflows.
create or replace function durable.lock_ahead(i_names text, i_keys text, i_ids text) returns void
language plpgsql security definer
set search_path = pg_catalog, durable, pg_temp
as $$
declare
    v_names text[];
    v_keys text[];
begin
    select array_agg(q.name), array_agg(q.key) into v_names, v_keys from (
        select n.name, coalesce(n.key, '') from rows from (string_to_table(i_names, E'\n'), string_to_table(i_keys, E'\n')) n(name, key)
        union
        select p.name, p.key from durable.permit p where p.id = any (string_to_array(i_ids, E'\n')::uuid[])) q(name, key);
    perform durable.lock_uses(v_names, v_keys);
end
$$;

-- durable.give_back(ids, seqs): permits of steps that are handed on in this transaction; the next may pass.
create or replace function durable.give_back(i_ids text, i_seqs text) returns void
language plpgsql security definer
set search_path = pg_catalog, durable, pg_temp
as $$
begin
    perform durable.give_back(string_to_array(i_ids, E'\n')::uuid[], string_to_array(i_seqs, E'\n')::int[]);
end
$$;

create or replace function durable.give_back(i_ids uuid[], i_seqs int[]) returns void
language plpgsql
set search_path = pg_catalog, durable, pg_temp
as $$
declare
    v_names text[];
    v_keys text[];
begin
    select array_agg(p.name), array_agg(p.key) into v_names, v_keys
    from unnest(i_ids, i_seqs) q(id, seq) join durable.permit p on p.id = q.id and p.seq = coalesce(q.seq, p.seq);
    if v_names is null then
        return;
    end if;
    perform durable.lock_uses(v_names, v_keys);
    with gone as (
        delete from durable.permit p using unnest(i_ids, i_seqs) q(id, seq) where p.id = q.id and p.seq = coalesce(q.seq, p.seq)
        returning p.name, p.key
    )
    update durable.limit_use u set used = u.used - g.n
    from (select g.name, g.key, count(*) as n from gone g group by 1, 2) g where u.name = g.name and u.key = g.key;
    perform durable.let_pass(v_names, v_keys);
end
$$;

-- durable.let_pass(names, keys): as many as the limits let pass now, under the lock of their counts.
-- A rate of N a period lets N pass at once and then one each N-th of the period: paid_until runs at most one period ahead of the clock.
-- Tables: limit_use (a row changed), queued (a row deleted), permit (a row, where a limit is on how many at once), timers, the logs.
create or replace function durable.let_pass(i_names text[], i_keys text[]) returns void
language plpgsql
set search_path = pg_catalog, durable, pg_temp
as $$
declare
    v_use record;
    v_now timestamptz := durable.timer_now();
    v_paid timestamptz;
    v_each interval;
    v_free bigint;
    v_paid_for bigint;
    v_passed int;
    v_held int;
    v_ids uuid[];
    v_lines text[];
begin
    for v_use in
        select u.*, k.concurrency, k.rate, k.period_ms * interval '1 ms' as period
        from durable.limit_use u join durable.limit_now k on k.name = u.name
        where (u.name, u.key) in (select * from unnest(i_names, i_keys)) order by u.name, u.key
    loop
        continue when not exists (select from durable.queued q where q.name = v_use.name and q.key = v_use.key);
        v_free := greatest(coalesce(v_use.concurrency - v_use.used, 1000000), 0);
        v_paid := greatest(v_use.paid_until, v_now);
        v_each := v_use.period / v_use.rate;
        v_paid_for := floor(extract(epoch from v_now + v_use.period - v_paid) / extract(epoch from v_each) + 0.000001);
        with first as (
            select q.number from durable.queued q where q.name = v_use.name and q.key = v_use.key
            order by q.weight desc, q.number limit least(v_free, v_paid_for)
        ), passing as (
            delete from durable.queued q using first f where q.number = f.number
            returning q.*
        ), permits as (
            insert into durable.permit (id, seq, name, key)
            select p.id, p.permit_seq, p.name, p.key from passing p where v_use.concurrency is not null
            on conflict do nothing
            returning 1
        )
        select count(*), array_agg(p.id order by p.weight desc, p.number), array_agg(p.line order by p.weight desc, p.number), (select count(*) from permits)
        into v_passed, v_ids, v_lines, v_held
        from passing p;
        perform durable.append_lines(v_ids, v_lines);
        v_paid := v_paid + v_passed * v_each;
        if v_paid_for <= v_free and coalesce(v_use.pump_at, '-infinity') <= v_now
            and exists (select from durable.queued q where q.name = v_use.name and q.key = v_use.key)
        then
            v_use.pump_at := durable.set_pump(v_use.name, v_use.key, v_paid + v_each - v_use.period - v_now);
        end if;
        update durable.limit_use u
        set used = u.used + v_held, paid_until = coalesce(v_paid, u.paid_until), pump_at = v_use.pump_at
        where u.name = v_use.name and u.key = v_use.key;
    end loop;
end
$$;

-- durable.set_pump(name, key, delay): a timer whose line lets the next pass when the rate does; not more often than timers are swept.
create or replace function durable.set_pump(i_name text, i_key text, i_delay interval) returns timestamptz
language plpgsql
set search_path = pg_catalog, durable, pg_temp
as $$
declare
    v_id uuid := md5(i_name || '/' || i_key);
    v_delay interval := greatest(i_delay, '20 ms');
begin
    perform durable.set_timers(array[v_id], array[1],
        array[durable.line(v_id, 1, '@limit', 'pass', 0, json_build_object('name', i_name, 'key', i_key)::text)],
        array[extract(epoch from v_delay)::float8 * 1000]);
    return durable.timer_now() + v_delay;
end
$$;

-- durable.pump(names, keys): a timer says that the rate lets somebody pass. One of each a line.
create or replace function durable.pump(i_names text, i_keys text) returns void
language plpgsql security definer
set search_path = pg_catalog, durable, pg_temp
as $$
declare
    v_names text[] := string_to_array(i_names, E'\n');
    v_keys text[] := durable.keys_of(i_keys);
begin
    perform durable.lock_uses(v_names, v_keys);
    update durable.limit_use u set pump_at = null where (u.name, u.key) in (select * from unnest(v_names, v_keys));
    perform durable.let_pass(v_names, v_keys);
end
$$;

-- durable.limit_now: the limits as they count.
create or replace view durable.limit_now as
select l.name, case when l.is_set then l.set_concurrency else l.concurrency end as concurrency,
    case when l.is_set then l.set_rate else l.rate end as rate, case when l.is_set then l.set_period_ms else l.period_ms end as period_ms,
    l.is_set
from durable.limit_of l;

-- durable.set_limit(name, concurrency, rate, period): these in place of what the code declares, from now on; null: no limit of that kind.
-- durable.reset_limit(name): what the code declares counts again. Whoever waits and may pass now, passes. Errors: DC002.
create or replace function durable.set_limit(i_name text, i_concurrency int, i_rate int default null, i_period interval default '1 second')
returns void
language plpgsql security definer
set search_path = pg_catalog, durable, pg_temp
as $$
begin
    perform durable.checked_name('limit', i_name);
    if i_concurrency < 0 or i_rate < 1 or (i_rate is not null and coalesce(i_period, '0') <= '0') then
        raise exception 'limit %: so many at once are 0 or more (%), so many a period 1 or more (%), a period is longer than nothing (%)',
            i_name, coalesce(i_concurrency::text, 'none'), coalesce(i_rate::text, 'none'), coalesce(i_period::text, 'none') using errcode = 'DC002';
    end if;
    insert into durable.limit_of as l (name, is_set, set_concurrency, set_rate, set_period_ms)
    values (i_name, true, i_concurrency, i_rate, extract(epoch from i_period) * 1000)
    on conflict (name) do update set is_set = true, set_concurrency = excluded.set_concurrency, set_rate = excluded.set_rate,
        set_period_ms = excluded.set_period_ms;
    perform durable.record('set_limit', array[null::uuid], null,
        array[jsonb_build_object('limit', i_name, 'concurrency', i_concurrency, 'rate', i_rate, 'period', i_period)]);
    perform durable.apply_limit(i_name);
end
$$;

create or replace function durable.reset_limit(i_name text) returns boolean
language plpgsql security definer
set search_path = pg_catalog, durable, pg_temp
as $$
begin
    update durable.limit_of l set is_set = false where l.name = i_name and l.is_set;
    if found then
        perform durable.record('reset_limit', array[null::uuid], null, array[jsonb_build_object('limit', i_name)]);
        perform durable.apply_limit(i_name);
        return true;
    end if;
    return false;
end
$$;

-- durable.apply_limit(name): who waits for it is looked at anew.
create or replace function durable.apply_limit(i_name text) returns void
language plpgsql
set search_path = pg_catalog, durable, pg_temp
as $$
declare
    v_keys text[] := array(select u.key from durable.limit_use u where u.name = i_name order by 1);
    v_names text[] := array_fill(i_name, array[cardinality(v_keys)]);
begin
    perform durable.lock_uses(v_names, v_keys);
    update durable.limit_use u set pump_at = null where u.name = i_name;
    perform durable.let_pass(v_names, v_keys);
end
$$;

-- durable.limits(): every limit, what holds and what waits for it, over all keys.
create or replace function durable.limits()
returns table (name text, concurrency int, rate int, period interval, is_set boolean, keys bigint, used bigint, waiting bigint)
language sql stable security definer
set search_path = pg_catalog, durable, pg_temp
as $$
    select k.name, k.concurrency, k.rate, k.period_ms * interval '1 ms', k.is_set,
        (select count(*) from durable.limit_use u where u.name = k.name),
        (select coalesce(sum(u.used), 0)::bigint from durable.limit_use u where u.name = k.name),
        (select count(*) from (select from durable.queued q where q.name = k.name limit 100001) q)
    from durable.limit_now k order by 1
$$;
