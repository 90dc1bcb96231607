-- Schedules: workflows that start by themselves. Run once.

create table durable.schedule (
    name text primary key,
    edition int not null default 1,
    cron text not null,
    zone text not null,
    workflow text not null,
    version int not null,
    step text not null,
    input text not null,
    due_as text,
    overlap text not null,
    catch_up_max int not null,
    catch_up_s float8,
    app text,
    is_in_code boolean not null default false,
    paused_at timestamptz,
    pause_reason text,
    since timestamptz not null,
    next_due timestamptz,
    queued timestamptz,
    last_due timestamptz,
    last_id uuid,
    fired bigint not null default 0,
    skipped bigint not null default 0,
    missed_from timestamptz,
    missed_until timestamptz
) with (fillfactor = 50);
comment on column durable.schedule.edition is 'One more with each change of cron or zone: whoever worked out due times from another edition does not fire.';
comment on column durable.schedule.due_as is 'The field of the input that gets the due time; null: none.';
comment on column durable.schedule.catch_up_max is 'Of the due times that were missed, so many of the newest still fire, and with catch_up_s none that is older.';
comment on column durable.schedule.app is 'Whose code declares it; null: it was made at run time.';
comment on column durable.schedule.since is 'When it was made, changed or resumed: what was due until then is not caught up.';
comment on column durable.schedule.next_due is 'The first due time that has not fired; null: there is none any more.';
comment on column durable.schedule.queued is 'The due time that waits for the end of the run before it.';
comment on column durable.schedule.missed_from is 'From here to before missed_until it did not fire, because nobody ran: the latest such stretch.';
create index on durable.schedule (next_due) where paused_at is null;
create index on durable.schedule (name) where queued is not null;

-- What a schedule started that was not seen to have ended.
create table durable.schedule_run (
    schedule text not null references durable.schedule on delete cascade,
    id uuid not null,
    primary key (schedule, id)
);
