-- What is not in the log: timers, long sleeps, detached steps, dead letters; and what windows know of crashes. Run once.

-- Its answer has more columns now; a function's columns cannot be replaced.
drop function if exists durable.locate(uuid);

-- A window after a crash: so many of its next lines are suspects (each runs alone), and how often the first of them crashed.
alter table durable.win add column suspects int not null default 0, add column crashes int not null default 0;

-- Timers are only ever inserted. A sweep remembers the pair (due, id) and the snapshot it has reached; what is new is the
-- difference. Three tables take turns: the current one, the one before it, and an empty one.
create sequence durable.timer_id;
create table durable.timer_0 (
    id bigint not null default nextval('durable.timer_id'),
    due timestamptz not null,
    txid xid8 not null default pg_current_xact_id(),
    workflow_id uuid not null,
    seq int not null,
    line text
);
comment on column durable.timer_0.line is 'The step event to append when it is due; null: that of the row in durable.wait, if it is still there.';
create index on durable.timer_0 (due, id);
create index on durable.timer_0 (txid);
create table durable.timer_1 (like durable.timer_0 including all);
create table durable.timer_2 (like durable.timer_0 including all);
create view durable.timer as
select * from durable.timer_0 union all select * from durable.timer_1 union all select * from durable.timer_2;

-- One row. Updated by sweeps that find something and by rotation, never by a timer.
create table durable.timer_control (
    one boolean primary key default true check (one),
    current int not null default 0 check (current between 0 and 2),
    reached_due timestamptz not null,
    reached_id bigint not null default 9223372036854775807,
    seen pg_snapshot not null,
    skew interval not null default '0',
    garbage bigint not null default 0,
    unfired_before bigint not null default 0
) with (fillfactor = 10);
comment on column durable.timer_control.skew is 'Added to the clock: a clock that was set back would otherwise stop the timers until it has caught up.';
comment on column durable.timer_control.garbage is 'Fired rows in all three tables: what a rotation is worth.';
comment on column durable.timer_control.unfired_before is 'Unfired rows of the table before the current one, counted when it ceased to be current: what a rotation costs.';
insert into durable.timer_control (reached_due, seen) values (clock_timestamp(), pg_current_snapshot());

-- A workflow that waits: deleting its row is the right to resume it. A sleep over a minute is a wait without a name.
create table durable.wait (
    id uuid not null,
    seq int not null,
    line text not null,
    due timestamptz not null,
    since timestamptz not null,
    primary key (id, seq)
);

-- A step that outlasts its page. owner: whose process runs it; 0: any process may take it. Completing it deletes the row.
create table durable.detached (
    id uuid not null,
    seq int not null,
    shard int not null references durable.shard,
    owner bigint not null,
    line text not null,
    progress text,
    crashes int not null default 0,
    is_alone boolean not null default false,
    since timestamptz not null,
    primary key (id, seq)
) with (fillfactor = 50);
create index on durable.detached (owner, since);
comment on column durable.detached.crashes is 'How many processes died with this step running; above zero it runs alone.';

-- Processes that run detached steps; a heartbeat touches the row while they do.
create table durable.lease (
    owner bigint primary key,
    active timestamptz not null
) with (fillfactor = 50);

-- A step that cannot go on, with all it needs to be taken up again. Alive: the workflow has not ended.
create table durable.dead_letter (
    id uuid not null,
    seq int not null,
    workflow text not null,
    step text not null,
    attempt int not null,
    reason text not null,
    details text not null,
    line text not null,
    at timestamptz not null,
    primary key (id, seq)
);
create index on durable.dead_letter (at);
comment on column durable.dead_letter.reason is 'attempts, given_up, crashes or unroutable.';
comment on column durable.dead_letter.details is 'JSON: reason, step, seq, attempt, traceback: what a failed workflow says too.';

-- The default partitions also keep what outlived its day; retention looks there for what has ended long ago.
create index on durable.finished_default (at);
