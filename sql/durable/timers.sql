-- Timers: rows that are only ever inserted. A sweep remembers how far it came, the pair (due, id), and the snapshot it saw; what
-- is new is a difference in two dimensions: what has become due since, and what was committed since although it was due before.
-- By time alone, a timer that commits after its due time is never seen; by snapshot alone, every sweep reads every sleeper.
-- Readers look at all three tables, so a writer whose idea of the current one is old does no harm.

-- durable.timer_now(): the clock of timers; it never steps back behind what a sweep has reached.
create or replace function durable.timer_now() returns timestamptz
language sql volatile security definer
set search_path = pg_catalog, durable, pg_temp
as $$ select greatest(durable.now() + c.skew, c.reached_due) from durable.timer_control c $$;

-- durable.set_timers(ids, seqs, lines, delays): one timer an element, delays in milliseconds. A sleep over a minute is a row in
-- durable.wait and a timer without a line: deleting the wait is the right to resume, so a timer of long ago wakes nobody.
-- Tables: the current timer table, wait (inserted). Shards asleep are notified of what is due within five seconds: their consumers
-- have worked out how long to sleep.
-- Hazard: a plan that names all three tables would lock them for the whole transaction, and rotation would starve.
create or replace function durable.set_timers(i_ids uuid[], i_seqs int[], i_lines text[], i_delays_ms float8[]) returns void
language plpgsql
set search_path = pg_catalog, durable, pg_temp
as $$
declare
    v_now timestamptz := durable.timer_now();
    v_long_ms constant float8 := 60000;
    v_soon_ms constant float8 := 5000;
begin
    insert into durable.wait (id, seq, line, due, since)
    select q.id, q.seq, q.line, v_now + make_interval(secs => q.ms / 1000), durable.now()
    from unnest(i_ids, i_seqs, i_lines, i_delays_ms) q(id, seq, line, ms) where q.ms > v_long_ms and q.line is not null
    -- The same step twice can only have been put into the log by hand: that must not stop its page.
    on conflict do nothing;
    execute 'insert into durable.timer_' || (select c.current from durable.timer_control c) || ' (due, workflow_id, seq, line)'
        ' select $5 + make_interval(secs => q.ms / 1000), q.id, q.seq, case when q.ms <= $6 then q.line end'
        ' from unnest($1, $2, $3, $4) q(id, seq, line, ms)'
        using i_ids, i_seqs, i_lines, i_delays_ms, v_now, v_long_ms;
    if exists (select from durable.shard s where durable.is_asleep(s.shard)) then
        perform pg_notify(s.queue, '') from durable.shard s
        where s.shard in (select l.shard from unnest(i_ids, i_delays_ms) q(id, ms)
                          join durable.slot l on l.slot = durable.slot_of(q.id) where q.ms <= v_soon_ms)
            and durable.is_asleep(s.shard);
    end if;
end
$$;

-- durable.schedule(lines, delays): envelopes, one a line, and as many delays in milliseconds, one a line. Each is appended to the log of
-- its shard when its delay is over. i_cleanups: a line each too, empty for what is no cleanup after a cancel. Errors: DC002.
create or replace function durable.schedule(i_lines text, i_delays_ms text, i_cleanups text default '') returns void
language plpgsql security definer
set search_path = pg_catalog, durable, pg_temp
as $$
declare
    v_ids_hex text[];
    v_ids uuid[];
    v_numbers text[];
    v_seqs int[];
    v_lines text[] := string_to_array(i_lines, E'\n');
    v_delays float8[];
    v_wrong int;
begin
    if i_lines is null or cardinality(v_lines) is distinct from cardinality(string_to_array(i_delays_ms, E'\n')) then
        raise exception '% delays for % lines; give one a piece', cardinality(string_to_array(i_delays_ms, E'\n')), cardinality(v_lines)
            using errcode = 'DC002';
    end if;
    -- Cut, not matched by durable.line_pattern: that takes a tenth of a millisecond a line, most of it for building its automaton.
    select array_agg(q.w order by q.o), array_agg(q.n order by q.o),
        min(q.o) filter (where q.head <> '{"w":"","n":' or q.w !~ '^[0-9a-f]{32}$' or q.n !~ '^[0-9]{1,9}$')
    into v_ids_hex, v_numbers, v_wrong
    from (select left(l.line, 6) || substr(l.line, 39, 6) head, substr(l.line, 7, 32) w, split_part(substr(l.line, 45, 10), ',', 1) n, l.o
          from unnest(v_lines) with ordinality l(line, o)) q;
    if v_wrong is not null then
        raise exception 'line % of % is no envelope; its head cannot be read', v_wrong, cardinality(v_lines) using errcode = 'DC002';
    end if;
    v_ids := v_ids_hex;
    v_seqs := v_numbers;
    begin
        v_delays := string_to_array(i_delays_ms, E'\n');
    exception when invalid_text_representation or numeric_value_out_of_range then
        raise exception 'a delay is no number of milliseconds: %', sqlerrm using errcode = 'DC002';
    end;
    perform durable.checked_delay_ms(d) from unnest(v_delays) d;
    -- A cancel looks for long sleeps under the stripe; one that was there before ends this sleep before it begins.
    perform durable.lock_stripes(array(select q.id from unnest(v_ids, v_delays) q(id, ms) where q.ms > 60000));
    if exists (select from durable.cancelled) then
        v_delays := array(
            select case when q.ms > 60000 and coalesce(q.cleanup, '') = '' and exists (select from durable.cancelled c where c.id = q.id)
                then 0 else q.ms end
            from rows from (unnest(v_ids, v_delays), string_to_table(i_cleanups, E'\n')) with ordinality q(id, ms, cleanup, o)
            order by q.o);
    end if;
    perform durable.set_timers(v_ids, v_seqs, v_lines, v_delays);
end
$$;

-- durable.checked_delay_ms(delay): the delay if it is from 0 to 100 years, else DC002.
create or replace function durable.checked_delay_ms(i_delay_ms float8) returns float8
language plpgsql immutable
set search_path = pg_catalog, durable, pg_temp
as $$
begin
    if i_delay_ms is null or i_delay_ms not between 0 and 100 * 365 * 86400000.0 then
        raise exception 'a delay of % ms is out of range; a delay is from 0 to 100 years', coalesce(i_delay_ms::text, 'null')
            using errcode = 'DC002';
    end if;
    return i_delay_ms;
end
$$;

-- durable.next_due(): seconds until a sweep has something to do, 0 or less when it has now; null when no timer waits. Reads only.
-- Now: a timer is due; one was committed after its time; a hundred are new, and would be read by each look until a sweep has seen
-- them; the clock was set back and the skew must be mended, or mended again, once a minute, until it is used up.
create or replace function durable.next_due() returns float8
language plpgsql stable security definer
set search_path = pg_catalog, durable, pg_temp set plan_cache_mode = force_generic_plan
set enable_seqscan = off set enable_bitmapscan = off
as $$
declare
    v_control durable.timer_control;
    v_now timestamptz;
    v_ended xid8[];
    v_new int;
    v_is_late boolean;
begin
    select c.* into v_control from durable.timer_control c where c.one;
    v_now := durable.now() + v_control.skew;
    if v_now < v_control.reached_due or (v_control.skew <> '0' and v_now > v_control.reached_due + interval '1 minute') then
        return 0;
    end if;
    v_ended := array(select x from pg_snapshot_xip(v_control.seen) x where pg_visible_in_snapshot(x, pg_current_snapshot()));
    select count(*), bool_or((q.due, q.id) <= (v_control.reached_due, v_control.reached_id)) into v_new, v_is_late
    from (select t.due, t.id from durable.timer t where t.txid >= pg_snapshot_xmax(v_control.seen)
          union all
          select t.due, t.id from durable.timer t where t.txid = any (v_ended)
          limit 100) q;
    if v_new = 100 or v_is_late then
        return 0;
    end if;
    return (select extract(epoch from t.due - v_now) from durable.timer t
            where (t.due, t.id) > (v_control.reached_due, v_control.reached_id) order by t.due, t.id limit 1);
end
$$;

-- durable.timers_due(within, due, id, max): the next timers that are due in so many seconds, the earliest first, after that one if one is
-- given, with the lines that they hold. What was committed after its time, or is due already, is for a sweep. Reads only.
create or replace function durable.timers_due(i_within_s float8, i_due timestamptz, i_id bigint, i_max int)
    returns table (due timestamptz, id bigint, line text)
language plpgsql stable security definer
set search_path = pg_catalog, durable, pg_temp set plan_cache_mode = force_generic_plan
set enable_seqscan = off set enable_bitmapscan = off
as $$
declare
    v_control durable.timer_control;
begin
    select c.* into v_control from durable.timer_control c where c.one;
    return query
        select t.due, t.id, t.line from durable.timer t
        where (t.due, t.id) > (coalesce(i_due, v_control.reached_due), coalesce(i_id, v_control.reached_id))
            and t.due <= durable.now() + v_control.skew + make_interval(secs => i_within_s)
        order by t.due, t.id limit i_max;
end
$$;

-- durable.sweep(max): fires what is due: appends the lines to the logs of their shards. How many timers it passed; after a full
-- page there may be more. Nothing to do, or somebody else at it: 0, and nothing is written.
--   i_max   how many that became due since the last sweep; what was committed after its time comes on top
-- Locks, in this order: the control row, skipped when held; the wait rows it resumes, sorted, skipped when held.
-- Tables: timer_control (one row updated), wait (a row deleted a long sleep), the shards' logs.
-- Hazards: the snapshot is taken in a later statement than the lock, or what the sweep before fired would be fired again. The own
-- transaction counts as running. A sweep that is rolled back, or that a server crash forgets, fires again.
create or replace function durable.sweep(i_max int default 2000) returns int
language plpgsql security definer
set search_path = pg_catalog, durable, pg_temp
as $$
declare
    v_control durable.timer_control;
    v_clock timestamptz;
    v_snap pg_snapshot;
begin
    perform durable.demand_read_committed();
    if coalesce(durable.next_due() > 0, true) then
        return 0;
    end if;
    perform set_config('synchronous_commit', 'off', true);
    select c.* into v_control from durable.timer_control c where c.one for update skip locked;
    if not found then
        return 0;
    end if;
    v_snap := pgque.snap();
    v_clock := durable.now();
    -- A clock that was set back goes on from where the timers were; they run a tenth slow until that is used up. One that is
    -- set forward again takes over.
    v_control.skew := case
        when v_clock >= v_control.reached_due then '0'
        when v_clock + v_control.skew < v_control.reached_due then v_control.reached_due - v_clock
        else v_control.skew - (v_clock + v_control.skew - v_control.reached_due) / 10
    end;
    return durable.fire(v_control, v_snap, v_clock + v_control.skew, i_max);
end
$$;

-- durable.fire(control, snapshot, now, max): the body of a sweep, under the lock of the control row. How many timers it passed.
-- Hazard: a wait that somebody is deleting at this moment is not waited for, a process stopped in the middle of its commit would hold
-- up every timer; its timer is set again, a second later, and then finds the wait or does not.
create or replace function durable.fire(i_control durable.timer_control, i_snap pg_snapshot, i_now timestamptz, i_max int) returns int
language plpgsql
set search_path = pg_catalog, durable, pg_temp set plan_cache_mode = force_generic_plan
set enable_seqscan = off set enable_bitmapscan = off set enable_hashjoin = off set enable_mergejoin = off
as $$
declare
    v_old alias for i_control;
    v_due timestamptz;
    v_id bigint;
    v_ended xid8[] := array(select x from pg_snapshot_xip(v_old.seen) x where pg_visible_in_snapshot(x, i_snap));
    v_passed int;
    v_busy_ids uuid[];
    v_busy_seqs int[];
    v_late_ids uuid[];
begin
    -- As far as this sweep goes: the last row of a full page, else now.
    select t.due, t.id into v_due, v_id from durable.timer t
    where (t.due, t.id) > (v_old.reached_due, v_old.reached_id) and t.due <= i_now and pg_visible_in_snapshot(t.txid, i_snap)
    order by t.due, t.id offset i_max - 1 limit 1;
    if not found then
        v_due := i_now;
        v_id := 9223372036854775807;
    end if;
    with fired as materialized (
        select t.* from durable.timer t
        where (t.due, t.id) > (v_old.reached_due, v_old.reached_id) and (t.due, t.id) <= (v_due, v_id)
            and pg_visible_in_snapshot(t.txid, i_snap)
        union all
        select t.* from durable.timer t
        where t.txid >= pg_snapshot_xmax(v_old.seen) and t.txid < pg_snapshot_xmax(i_snap) and pg_visible_in_snapshot(t.txid, i_snap)
            and (t.due, t.id) <= (v_old.reached_due, v_old.reached_id)
        union all
        select t.* from durable.timer t
        where t.txid = any (v_ended) and (t.due, t.id) <= (v_old.reached_due, v_old.reached_id)
    ), long as materialized (
        select distinct f.workflow_id, f.seq from fired f where f.line is null
    ), held as materialized (
        select w.id, w.seq from (select * from long l order by l.workflow_id, l.seq) l cross join lateral (
            select w.id, w.seq from durable.wait w where w.id = l.workflow_id and w.seq = l.seq for update skip locked) w
    ), resumed as (
        delete from durable.wait w using held h where w.id = h.id and w.seq = h.seq returning w.id, w.due, w.line, w.names
    ), appended as materialized (
        select durable.append_lines(array_agg(l.id order by l.due, l.id), array_agg(l.line order by l.due, l.id))
        from (select f.workflow_id, f.due, f.line from fired f where f.line is not null
              union all select r.id, r.due, r.line from resumed r) l(id, due, line)
    ), busy as (
        -- A set difference, which is hashed: an anti-join would be a loop in a loop here.
        select w.id, w.seq from (select l.workflow_id, l.seq from long l except select h.id, h.seq from held h) l cross join lateral (
            select w.id, w.seq from durable.wait w where w.id = l.workflow_id and w.seq = l.seq offset 0) w
    )
    select (select count(*) from fired), array(select r.id from resumed r where r.names is not null), array_agg(b.id), array_agg(b.seq)
    into v_passed, v_late_ids, v_busy_ids, v_busy_seqs
    from (select count(*) from appended) a left join busy b on true;
    if v_busy_ids[1] is not null then
        execute 'insert into durable.timer_' || v_old.current || ' (due, workflow_id, seq)'
            ' select $3, q.id, q.seq from unnest($1, $2) q(id, seq)' using v_busy_ids, v_busy_seqs, i_now + interval '1 second';
    end if;
    if v_late_ids <> '{}' then
        perform durable.record('timeout', v_late_ids);
    end if;
    update durable.timer_control c
    set reached_due = v_due, reached_id = v_id, seen = i_snap, skew = v_old.skew, garbage = c.garbage + v_passed
    where c.one;
    return v_passed;
end
$$;

-- durable.needs_timer_rotation(): whether fired rows are worth a rotation. Driven by what it frees, so that a million sleepers
-- are not copied for nothing.
create or replace function durable.needs_timer_rotation() returns boolean
language sql stable security definer
set search_path = pg_catalog, durable, pg_temp
as $$ select c.garbage >= greatest(10000, c.unfired_before) from durable.timer_control c $$;

-- durable.rotate_timers(): makes the empty table the current one, carries what is unfired of the oldest into it, and empties that.
-- How many were carried; -1 when somebody holds a lock. Tables: timer_control (one row updated), the three timer tables.
-- Hazards: the oldest table's writers are locked out first, and its rows read in a later statement, so that none in flight is
-- truncated unseen. Its readers may go on until the truncate, which waits for them a fifth of a second and then gives up: who waits
-- for that lock lets nobody else pass. Carried rows are new to the snapshot, so late ones among them stay late.
create or replace function durable.rotate_timers() returns int
language plpgsql security definer
set search_path = pg_catalog, durable, pg_temp
as $$
declare
    v_control durable.timer_control;
    v_next text;
    v_oldest text;
    v_carried int;
    v_all bigint;
    v_unfired bigint;
begin
    perform durable.demand_read_committed();
    select c.* into v_control from durable.timer_control c where c.one for update skip locked;
    if not found then
        return -1;
    end if;
    v_next := 'durable.timer_' || (v_control.current + 1) % 3;
    v_oldest := 'durable.timer_' || (v_control.current + 2) % 3;
    perform set_config('lock_timeout', '200', true);
    begin
        execute 'lock table ' || v_oldest || ' in share row exclusive mode nowait';
        execute 'insert into ' || v_next || ' (id, due, workflow_id, seq, line) select t.id, t.due, t.workflow_id, t.seq, t.line from '
            || v_oldest || ' t where (t.due, t.id) > ($1, $2) or not pg_visible_in_snapshot(t.txid, $3)'
            using v_control.reached_due, v_control.reached_id, v_control.seen;
        get diagnostics v_carried = row_count;
        execute 'truncate ' || v_oldest;
    exception when lock_not_available then
        return -1;
    end;
    execute 'select count(*), count(*) filter (where (t.due, t.id) > ($1, $2) or not pg_visible_in_snapshot(t.txid, $3))'
        ' from durable.timer_' || v_control.current || ' t'
        into v_all, v_unfired using v_control.reached_due, v_control.reached_id, v_control.seen;
    update durable.timer_control c
    set current = (v_control.current + 1) % 3, garbage = v_all - v_unfired, unfired_before = v_unfired where c.one;
    return v_carried;
end
$$;
