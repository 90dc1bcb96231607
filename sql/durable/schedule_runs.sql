-- Runs of schedules. Firing starts a workflow under a key of name and due time and moves the schedule's row on to the next due time, in
-- one transaction, under the row's lock: a due time fires once, whoever looks.

-- durable.schedule_key(name, due): the key of the workflow that a due time starts: nightly@2026-03-29T01:00:00Z, always in UTC.
create or replace function durable.schedule_key(i_name text, i_due timestamptz) returns text
language sql immutable
set search_path = pg_catalog, durable, pg_temp
as $$
    select i_name || '@' || to_char(i_due at time zone 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS')
        || case when i_due = date_trunc('second', i_due) then '' else to_char(i_due at time zone 'UTC', '.US') end || 'Z'
$$;

-- durable.scheduled_input(input, field, due, zone): the input with the due time in that field, as the clocks of the zone show it; at its
-- end: what tells a coded input apart is its begin.
create or replace function durable.scheduled_input(i_input text, i_due_as text, i_due timestamptz, i_zone text) returns text
language plpgsql stable
set search_path = pg_catalog, durable, pg_temp set timezone = 'UTC'
as $$
begin
    if i_due_as is null then
        return i_input;
    end if;
    perform set_config('timezone', i_zone, true);
    return left(rtrim(i_input, E' \t'), -1) || case when i_input ~ '^\s*\{\s*\}\s*$' then '' else ',' end
        || to_json(i_due_as) || ':' || to_json(i_due) || '}';
end
$$;

-- durable.may_begin(schedule): whether a run may begin: nothing that it has started lives, or several may.
create or replace function durable.may_begin(i_schedule durable.schedule) returns boolean
language sql stable
set search_path = pg_catalog, durable, pg_temp
as $$
    select (i_schedule).overlap = 'allow'
        or not exists (select from durable.schedule_run r where r.schedule = (i_schedule).name and durable.is_live(r.id))
$$;

-- durable.next_schedule(): seconds until a schedule has something to do, 0 or less when one has now; null: none will. Reads only.
create or replace function durable.next_schedule() returns float8
language sql stable security definer
set search_path = pg_catalog, durable, pg_temp
as $$
    select least(
        (select extract(epoch from s.next_due - durable.now())::float8 from durable.schedule s
         where s.paused_at is null and s.next_due is not null order by s.next_due limit 1),
        (select 0 where exists (select from durable.schedule s
                                where s.queued is not null and s.paused_at is null and durable.may_begin(s))))
$$;

-- durable.due_schedules(max, without): schedules whose time has come, the longest due first, with what it takes to work out which
-- times fire. i_without: names that are left out.
create or replace function durable.due_schedules(i_max int, i_without text[] default '{}')
returns table (name text, edition int, cron text, zone text, since timestamptz, next_due timestamptz, catch_up_max int,
    catch_up_s float8, now timestamptz)
language sql stable security definer
set search_path = pg_catalog, durable, pg_temp
as $$
    select s.name, s.edition, s.cron, s.zone, s.since, s.next_due, s.catch_up_max, s.catch_up_s, n.now
    from (select durable.now() as now offset 0) n join durable.schedule s on s.next_due <= n.now
    where s.paused_at is null and s.name <> all (i_without) order by s.next_due, s.name limit i_max
$$;

-- durable.begin_run(name, due): starts the workflow of a due time, unless that was started already, under the lock of the schedule's
-- row. Tables: key, started, the shard's log, schedule_run (a row each), schedule (one row updated).
create or replace function durable.begin_run(i_name text, i_due timestamptz, out id uuid, out is_new boolean)
language plpgsql
set search_path = pg_catalog, durable, pg_temp
as $$
declare
    v_schedule durable.schedule := durable.locked_schedule(i_name);
begin
    select b.id, b.is_new into begin_run.id, begin_run.is_new
    from durable.start(v_schedule.workflow, v_schedule.version, v_schedule.step,
        durable.scheduled_input(v_schedule.input, v_schedule.due_as, i_due, v_schedule.zone), durable.schedule_key(i_name, i_due)) b;
    if begin_run.is_new then
        insert into durable.schedule_run (schedule, id) values (i_name, begin_run.id);
        update durable.schedule s set fired = s.fired + 1, last_due = i_due, last_id = begin_run.id where s.name = i_name;
    end if;
end
$$;

-- durable.start_waiting(name): starts the run that waits for those before it, if they have ended; under the lock of the schedule's row.
-- Whether it did. Tables: schedule_run (what has ended is deleted), schedule.
create or replace function durable.start_waiting(i_name text) returns boolean
language plpgsql
set search_path = pg_catalog, durable, pg_temp
as $$
declare
    v_schedule durable.schedule := durable.locked_schedule(i_name);
begin
    delete from durable.schedule_run r where r.schedule = i_name and not durable.is_live(r.id);
    if v_schedule.queued is null or not durable.may_begin(v_schedule) then
        return false;
    end if;
    perform durable.begin_run(i_name, v_schedule.queued);
    update durable.schedule s set queued = null where s.name = i_name;
    return true;
end
$$;

-- durable.start_queued(): starts the runs that wait and need no longer; those of paused schedules wait on. How many. One that cannot be
-- started is a warning in the server's log, and holds up no other.
create or replace function durable.start_queued() returns int
language plpgsql security definer
set search_path = pg_catalog, durable, pg_temp
as $$
declare
    v_name text;
    v_started int := 0;
begin
    perform durable.demand_read_committed();
    for v_name in
        select s.name from durable.schedule s
        where s.queued is not null and s.paused_at is null and durable.may_begin(s) order by s.name for update skip locked
    loop
        begin
            v_started := v_started + durable.start_waiting(v_name)::int;
        exception when others then
            raise warning 'schedule %: the run that waits could not be started: %', quote_literal(v_name), sqlerrm;
        end;
    end loop;
    return v_started;
end
$$;

-- durable.run_schedule(name, due, overlap): starts the run of a due time, or what the overlap policy does in its place while another
-- lives; under the lock of the schedule's row, after durable.start_waiting. Outcome: started, known (it was before), queued or skipped.
create or replace function durable.run_schedule(i_name text, i_due timestamptz, i_overlap text, out outcome text, out id uuid)
language plpgsql
set search_path = pg_catalog, durable, pg_temp
as $$
declare
    v_schedule durable.schedule;
begin
    v_schedule := durable.locked_schedule(i_name);
    v_schedule.overlap := i_overlap;
    if durable.may_begin(v_schedule) then
        select case when b.is_new then 'started' else 'known' end, b.id into outcome, run_schedule.id
        from durable.begin_run(i_name, i_due) b;
    elsif i_overlap = 'queue' and v_schedule.queued is null then
        outcome := 'queued';
        update durable.schedule s set queued = i_due where s.name = i_name;
    else
        outcome := 'skipped';
        update durable.schedule s set skipped = s.skipped + 1 where s.name = i_name;
    end if;
end
$$;

-- durable.fire_schedule(name, edition, due, dues, next, missed_from, missed_until): starts what is due and moves on to the next due time.
--   i_edition, i_due  what the caller worked from; i_dues: the times to fire, none that was missed by more than is caught up
--   i_missed_from     the first that is not caught up, up to before i_missed_until; null: none was missed
-- Result: how many workflows were started; null when somebody else has fired or changed it, or is at it, and nothing was done.
-- Locks: the schedule's row, skipped when held. Hazard: due time and edition are compared under the lock, or two would fire it.
create or replace function durable.fire_schedule(i_name text, i_edition int, i_due timestamptz, i_dues timestamptz[],
    i_next timestamptz, i_missed_from timestamptz default null, i_missed_until timestamptz default null) returns int
language plpgsql security definer
set search_path = pg_catalog, durable, pg_temp
as $$
declare
    v_schedule durable.schedule;
    v_due timestamptz;
    v_started int := 0;
begin
    perform durable.demand_read_committed();
    select s.* into v_schedule from durable.schedule s
    where s.name = i_name and s.edition = i_edition and s.next_due = i_due and s.paused_at is null for update skip locked;
    if not found then
        return null;
    end if;
    perform durable.start_waiting(i_name);
    foreach v_due in array i_dues loop
        v_started := v_started + ((durable.run_schedule(i_name, v_due, v_schedule.overlap)).outcome = 'started')::int;
    end loop;
    update durable.schedule s
    set next_due = i_next, missed_from = coalesce(i_missed_from, s.missed_from), missed_until = coalesce(i_missed_until, s.missed_until)
    where s.name = i_name;
    return v_started;
end
$$;

-- durable.trigger_schedule(name, overlap): a run now, in the caller's transaction, also of a paused schedule; its due time is now.
--   i_overlap  in place of the schedule's own policy
-- Result: started and the whole id of the workflow (this is the answer that gives it), queued or skipped. Errors: DC003, DC002.
create or replace function durable.trigger_schedule(i_name text, i_overlap text default null, out outcome text, out id uuid)
language plpgsql security definer
set search_path = pg_catalog, durable, pg_temp
as $$
declare
    v_schedule durable.schedule := durable.locked_schedule(i_name);
begin
    if i_overlap not in ('skip', 'queue', 'allow') then
        raise exception 'overlap % is none; it is skip, queue or allow', quote_literal(left(i_overlap, 80)) using errcode = 'DC002';
    end if;
    perform durable.start_waiting(i_name);
    select r.outcome, r.id into trigger_schedule.outcome, trigger_schedule.id
    from durable.run_schedule(i_name, durable.now(), coalesce(i_overlap, v_schedule.overlap)) r;
end
$$;

-- durable.backfill_schedule(name, edition, dues): runs of due times that are past, all at once, whatever the overlap policy; those that
-- were started before are not started again. How many were. Errors: DC003; DC002 for more than 1,000, and after a change.
create or replace function durable.backfill_schedule(i_name text, i_edition int, i_dues timestamptz[]) returns int
language plpgsql security definer
set search_path = pg_catalog, durable, pg_temp
as $$
declare
    v_schedule durable.schedule := durable.locked_schedule(i_name);
    v_due timestamptz;
    v_started int := 0;
begin
    if cardinality(i_dues) > 1000 then
        raise exception '% due times at once; backfill at most 1000', cardinality(i_dues) using errcode = 'DC002';
    end if;
    if v_schedule.edition <> i_edition then
        raise exception 'schedule % was changed meanwhile; look at it and try again', quote_literal(i_name) using errcode = 'DC002';
    end if;
    foreach v_due in array i_dues loop
        v_started := v_started + ((durable.begin_run(i_name, v_due)).is_new)::int;
    end loop;
    return v_started;
end
$$;

-- durable.runs_of(name, dues): what became of these due times of a schedule, for people; no row for one that started nothing.
--   status  running, stuck, completed, failed or cancelled
create or replace function durable.runs_of(i_name text, i_dues timestamptz[])
returns table (due timestamptz, id text, status text, started_at timestamptz, finished_at timestamptz)
language sql stable security definer
set search_path = pg_catalog, durable, pg_temp
as $$
    select q.due, durable.short(k.id), coalesce(f.status, case when exists (select from durable.dead_letter d where d.id = k.id) then 'stuck'
        else 'running' end), b.at, f.at
    from durable.schedule s cross join unnest(i_dues[1:1000]) q(due)
    join durable.key k on k.workflow = s.workflow and k.key = durable.schedule_key(i_name, q.due)
    join durable.started b on b.id = k.id and b.day = durable.day_of(k.id)
    left join durable.finished f on f.id = k.id and f.day = durable.day_of(k.id)
    where s.name = i_name order by q.due desc
$$;
