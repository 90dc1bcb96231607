-- Children and joins, pauses, limits, priorities. Run once.

-- Their answers have more columns now; a function's columns cannot be replaced.
drop function if exists durable.asides();
drop function if exists durable.forget_signals(uuid[]);
drop function if exists durable.of_signals(int);
drop function if exists durable.deliver_cancels(text, text, text);
drop function if exists durable.cancel(uuid, text, text);

-- A child knows its parent for as long as it is known itself. number: from 0, in the parent's group that begins with step parent_seq.
alter table durable.started
    add column parent uuid,
    add column parent_seq int,
    add column number int;
create index on durable.started (parent, parent_seq, number) where parent is not null;

-- A row a workflow that ever spawned: its last group of children. Each page that ends some of them changes it once.
create table durable.fanout (
    id uuid primary key,
    day int not null,
    seq int not null,
    total int not null,
    completed int not null default 0,
    failed int not null default 0,
    wait_seq int,
    needed int,
    tolerance int,
    cancels_rest boolean not null default false
) with (fillfactor = 50);
comment on column durable.fanout.day is 'When the first of the group was spawned: they start on that day or later.';
comment on column durable.fanout.seq is 'The step that spawned the first of the group.';
comment on column durable.fanout.failed is 'How many have ended otherwise than completed.';
comment on column durable.fanout.wait_seq is 'The step that the parent goes on with; null while it has not begun to wait: the group may still grow.';
comment on column durable.fanout.needed is 'So many completed children are enough; null: all have to end.';
comment on column durable.fanout.tolerance is 'With more failed children than this the parent goes on at once; null: with any number it waits.';
comment on column durable.wait.names is 'The signals that resume it; none (an empty array): its children do; null: a sleep, which only its timer ends.';

-- What is paused. A shard that is paused says so itself: whoever claims it reads its row anyway.
create table durable.pause (
    scope text not null check (scope in ('workflow', 'type')),
    name text not null,
    actor text,
    at timestamptz not null,
    primary key (scope, name)
);
comment on column durable.pause.name is 'The id of a workflow, as 32 digits, or the name of a type.';
alter table durable.shard add column is_paused boolean not null default false;

-- Step events that met a pause.
create table durable.parked (
    id uuid not null,
    seq int not null,
    workflow text not null,
    line text not null,
    since timestamptz not null,
    primary key (id, seq)
);
create index on durable.parked (workflow);

-- Limits, by name. What the code declares, and what was set in its place at run time (which wins).
create table durable.limit_of (
    name text primary key,
    concurrency int check (concurrency >= 0),
    rate int check (rate > 0),
    period_ms float8 check (period_ms > 0),
    is_set boolean not null default false,
    set_concurrency int check (set_concurrency >= 0),
    set_rate int check (set_rate > 0),
    set_period_ms float8 check (set_period_ms > 0)
);
comment on column durable.limit_of.is_set is 'Whether what was set counts; null in a field: no limit of that kind.';

-- One row a key that a limit is counted for. Locked by whoever takes or gives back.
create table durable.limit_use (
    name text not null,
    key text not null,
    used int not null default 0,
    paid_until timestamptz not null default '-infinity',
    pump_at timestamptz,
    primary key (name, key)
) with (fillfactor = 50);
comment on column durable.limit_use.used is 'How many hold a permit.';
comment on column durable.limit_use.paid_until is 'The rate is used up to then: each that passes moves it on by a period divided by the rate.';
comment on column durable.limit_use.pump_at is 'When the next one may pass, if a timer is set for that.';

-- Who holds one. seq 0: the workflow, until it ends; else a step, until it has been handed on.
create table durable.permit (
    id uuid not null,
    seq int not null,
    name text not null,
    key text not null,
    primary key (id, seq)
);

-- Step events that wait for a permit, in the order of weight and arrival.
create sequence durable.queue_number;
create table durable.queued (
    name text not null,
    key text not null,
    number bigint not null default nextval('durable.queue_number'),
    id uuid not null,
    seq int not null,
    permit_seq int not null,
    line text not null,
    weight float8 not null default 1,
    primary key (number)
);
create index on durable.queued (name, key, weight desc, number);
create index on durable.queued (id);

-- Weights of live workflows, other than 1.
create table durable.priority (
    id uuid primary key,
    weight float8 not null
);
create index on durable.priority (weight);
