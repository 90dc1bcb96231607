-- Schedules: what they are. A row says what starts, when it is due next, and what happens while an earlier run lives. Which times are due
-- is worked out in Python (cron and summer time); see schedule_runs for what becomes of them.

-- durable.check_schedule(…): DC002 for what a schedule cannot have, naming the field. The cron is checked by who works it out.
create or replace function durable.check_schedule(i_cron text, i_zone text, i_workflow text, i_step text, i_input text,
    i_overlap text, i_due_as text, i_catch_up_max int, i_catch_up_s float8) returns void
language plpgsql stable
set search_path = pg_catalog, durable, pg_temp
as $$
begin
    perform durable.checked_label('cron', i_cron, 255), durable.checked_name('workflow', i_workflow),
        durable.checked_name('step', i_step), durable.checked_payload(i_input), durable.checked_label('due_as', i_due_as, 57);
    begin
        perform durable.now() at time zone i_zone;
    exception when invalid_parameter_value then
        raise exception 'zone % is not known to the database', quote_literal(left(i_zone, 80)) using errcode = 'DC002';
    end;
    if i_overlap not in ('skip', 'queue', 'allow') then
        raise exception 'overlap % is none; it is skip, queue or allow', quote_literal(left(i_overlap, 80)) using errcode = 'DC002';
    end if;
    if i_catch_up_max not between 1 and 1000 or i_catch_up_s <= 0 then
        raise exception 'catch_up of % due times, % s is out of range; it is 1 to 1000 due times, or a while',
            i_catch_up_max, coalesce(i_catch_up_s::text, 'any') using errcode = 'DC002';
    end if;
    if i_due_as is not null and (json_typeof(i_input::json) <> 'object' or i_input::json -> i_due_as is not null) then
        raise exception 'due_as %: the input has to be an object without that field', quote_literal(i_due_as) using errcode = 'DC002';
    end if;
end
$$;

-- durable.from_now(next): now, or before the next due time, if that has come since it was worked out.
create or replace function durable.from_now(i_next timestamptz) returns timestamptz
language sql volatile
set search_path = pg_catalog, durable, pg_temp
as $$ select least(durable.now(), i_next - interval '1 second') $$;

-- durable.put_schedule(…): makes a schedule. One that an app declares (i_app) is changed where its code has changed since.
--   i_next          its first due time from now on, worked out by the caller
--   i_catch_up_max  of what was missed, so many of the newest due times fire; i_catch_up_s: none older than so many seconds
-- Result: made, changed or same. Errors: DC002, also for a name that is another app's, or was made at run time, or made already.
-- Tables: schedule (one row inserted or updated).
create or replace function durable.put_schedule(i_name text, i_cron text, i_zone text, i_next timestamptz, i_workflow text, i_version int,
    i_step text, i_input text, i_overlap text default 'skip', i_due_as text default null, i_catch_up_max int default 1,
    i_catch_up_s float8 default null, i_app text default null) returns text
language plpgsql security definer
set search_path = pg_catalog, durable, pg_temp
as $$
declare
    v_app text;
begin
    perform durable.checked_name('schedule', i_name);
    perform durable.check_schedule(i_cron, i_zone, i_workflow, i_step, i_input, i_overlap, i_due_as, i_catch_up_max, i_catch_up_s);
    loop
        insert into durable.schedule (name, cron, zone, workflow, version, step, input, due_as, overlap, catch_up_max, catch_up_s,
            app, is_in_code, since, next_due)
        values (i_name, i_cron, i_zone, i_workflow, i_version, i_step, durable.checked_payload(i_input), i_due_as, i_overlap,
            i_catch_up_max, i_catch_up_s, i_app, i_app is not null, durable.from_now(i_next), i_next)
        on conflict do nothing;
        if found then
            return 'made';
        end if;
        select s.app into v_app from durable.schedule s where s.name = i_name for update;
        exit when found;  -- else somebody deleted it between the two statements
    end loop;
    if v_app is null or v_app is distinct from i_app then
        raise exception 'schedule % is there already: %; delete it, or take another name', quote_literal(i_name),
            coalesce('app ' || quote_literal(v_app) || ' declares it', 'it was made at run time') using errcode = 'DC002';
    end if;
    update durable.schedule s set is_in_code = true where s.name = i_name and not s.is_in_code;
    return durable.alter_schedule(i_name, i_cron, i_zone, i_next, i_workflow, i_version, i_step, i_input, i_overlap,
        coalesce(i_due_as, ''), i_catch_up_max, coalesce(i_catch_up_s, 'infinity'));
end
$$;

-- durable.change_schedule(…): changes what was made at run time; null: as it is, an empty due_as: none, an infinite catch_up_s: none.
-- Result: changed or same. Errors: DC003 for an unknown name; DC002, also for one that an app declares.
create or replace function durable.change_schedule(i_name text, i_cron text default null, i_zone text default null,
    i_next timestamptz default null, i_workflow text default null, i_version int default null, i_step text default null,
    i_input text default null, i_overlap text default null, i_due_as text default null, i_catch_up_max int default null,
    i_catch_up_s float8 default null) returns text
language plpgsql security definer
set search_path = pg_catalog, durable, pg_temp
as $$
declare
    v_schedule durable.schedule := durable.locked_schedule(i_name);
begin
    if v_schedule.is_in_code then
        raise exception 'app % declares schedule % in its code; change it there', quote_literal(v_schedule.app), quote_literal(i_name)
            using errcode = 'DC002';
    end if;
    return durable.alter_schedule(i_name, i_cron, i_zone, i_next, i_workflow, i_version, i_step, i_input, i_overlap, i_due_as,
        i_catch_up_max, i_catch_up_s);
end
$$;

-- durable.locked_schedule(name): its row, locked; DC003 without one.
create or replace function durable.locked_schedule(i_name text) returns durable.schedule
language plpgsql
set search_path = pg_catalog, durable, pg_temp
as $$
declare
    v_schedule durable.schedule;
begin
    select s.* into v_schedule from durable.schedule s where s.name = i_name for update;
    if not found then
        raise exception 'no schedule %; see durable.schedules()', quote_literal(left(i_name, 80)) using errcode = 'DC003';
    end if;
    return v_schedule;
end
$$;

-- durable.alter_schedule(…): the body of both. Only another cron or zone moves the next due time: a restart after an outage must not
-- forget what was missed.
create or replace function durable.alter_schedule(i_name text, i_cron text, i_zone text, i_next timestamptz, i_workflow text,
    i_version int, i_step text, i_input text, i_overlap text, i_due_as text, i_catch_up_max int, i_catch_up_s float8) returns text
language plpgsql
set search_path = pg_catalog, durable, pg_temp
as $$
declare
    v_old durable.schedule := durable.locked_schedule(i_name);
    v_new durable.schedule := v_old;
begin
    v_new.cron := coalesce(i_cron, v_old.cron);
    v_new.zone := coalesce(i_zone, v_old.zone);
    v_new.workflow := coalesce(i_workflow, v_old.workflow);
    v_new.version := coalesce(i_version, v_old.version);
    v_new.step := coalesce(i_step, v_old.step);
    v_new.input := coalesce(durable.checked_payload(i_input), v_old.input);
    v_new.overlap := coalesce(i_overlap, v_old.overlap);
    v_new.due_as := nullif(coalesce(i_due_as, v_old.due_as), '');
    v_new.catch_up_max := coalesce(i_catch_up_max, v_old.catch_up_max);
    v_new.catch_up_s := nullif(coalesce(i_catch_up_s, v_old.catch_up_s), 'infinity');
    perform durable.check_schedule(v_new.cron, v_new.zone, v_new.workflow, v_new.step, v_new.input, v_new.overlap, v_new.due_as,
        v_new.catch_up_max, v_new.catch_up_s);
    if v_new is not distinct from v_old then
        return 'same';
    end if;
    if (v_new.cron, v_new.zone) is distinct from (v_old.cron, v_old.zone) then
        v_new.edition := v_old.edition + 1;
        v_new.since := durable.from_now(i_next);
        v_new.next_due := i_next;
    end if;
    update durable.schedule s
    set (edition, cron, zone, workflow, version, step, input, due_as, overlap, catch_up_max, catch_up_s, since, next_due)
        = row(v_new.edition, v_new.cron, v_new.zone, v_new.workflow, v_new.version, v_new.step, v_new.input, v_new.due_as,
            v_new.overlap, v_new.catch_up_max, v_new.catch_up_s, v_new.since, v_new.next_due)
    where s.name = i_name;
    return 'changed';
end
$$;

-- durable.undeclared(app, names): this app's schedules that its code no longer declares. They go on firing until somebody deletes them.
-- Tables: schedule (those that were still declared are updated).
create or replace function durable.undeclared(i_app text, i_names text[]) returns setof text
language sql volatile security definer
set search_path = pg_catalog, durable, pg_temp
as $$
    update durable.schedule s set is_in_code = false where s.app = i_app and s.is_in_code and s.name <> all (i_names);
    select s.name from durable.schedule s where s.app = i_app and s.name <> all (i_names) order by s.name;
$$;

-- durable.reroute_schedules(workflow, version, step): from now on its schedules begin it where its code begins. How many were changed.
create or replace function durable.reroute_schedules(i_workflow text, i_version int, i_step text) returns int
language plpgsql security definer
set search_path = pg_catalog, durable, pg_temp
as $$
declare
    v_changed int;
begin
    update durable.schedule s set version = i_version, step = i_step
    where s.workflow = i_workflow and (s.version, s.step) is distinct from (i_version, i_step);
    get diagnostics v_changed = row_count;
    return v_changed;
end
$$;

-- durable.pause_schedule(name, reason), durable.resume_schedule(name): whether that changed anything. What is due meanwhile does not
-- fire, later neither; a run that waits for the one before it waits on. Errors: DC003, DC002.
create or replace function durable.pause_schedule(i_name text, i_reason text default null) returns boolean
language plpgsql security definer
set search_path = pg_catalog, durable, pg_temp
as $$
begin
    perform durable.locked_schedule(i_name), durable.checked_label('reason', i_reason, 1000);
    update durable.schedule s set paused_at = durable.now(), pause_reason = i_reason where s.name = i_name and s.paused_at is null;
    return found;
end
$$;

create or replace function durable.resume_schedule(i_name text) returns boolean
language plpgsql security definer
set search_path = pg_catalog, durable, pg_temp
as $$
begin
    perform durable.locked_schedule(i_name);
    update durable.schedule s set paused_at = null, pause_reason = null, since = durable.now()
    where s.name = i_name and s.paused_at is not null;
    return found;
end
$$;

-- durable.delete_schedule(name): what it has started goes on. Errors: DC003.
create or replace function durable.delete_schedule(i_name text) returns void
language plpgsql security definer
set search_path = pg_catalog, durable, pg_temp
as $$
begin
    perform durable.locked_schedule(i_name);
    delete from durable.schedule s where s.name = i_name;
end
$$;

-- durable.schedules(name): all schedules, or one, by their names; ids are truncated and no input is shown.
--   running  how many of its workflows live; next_due: null while it is paused, has just been resumed, or is never due again
create or replace function durable.schedules(i_name text default null)
returns table (name text, edition int, workflow text, cron text, zone text, overlap text, catch_up_max int, catch_up_s float8,
    due_as text, app text, is_in_code boolean, paused_at timestamptz, pause_reason text, next_due timestamptz, last_due timestamptz,
    last_id text, running int, queued timestamptz, fired bigint, skipped bigint, missed_from timestamptz, missed_until timestamptz)
language sql stable security definer
set search_path = pg_catalog, durable, pg_temp
as $$
    select s.name, s.edition, s.workflow, s.cron, s.zone, s.overlap, s.catch_up_max, s.catch_up_s, s.due_as, s.app, s.is_in_code,
        s.paused_at, s.pause_reason, case when s.paused_at is null and s.next_due > s.since then s.next_due end, s.last_due,
        durable.short(s.last_id),
        (select count(*)::int from durable.schedule_run r where r.schedule = s.name and durable.is_live(r.id)),
        s.queued, s.fired, s.skipped, s.missed_from, s.missed_until
    from durable.schedule s where i_name is null or s.name = i_name order by s.name
$$;

-- durable.schedule_input(name): what its workflows start with: a payload.
create or replace function durable.schedule_input(i_name text) returns text
language sql stable security definer
set search_path = pg_catalog, durable, pg_temp
as $$ select s.input from durable.schedule s where s.name = i_name $$;
