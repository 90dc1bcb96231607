-- The tables of the durable layer. Lifecycle rows are appended and dropped by the day; windows are the only rows that change.

create table durable.cluster (
    one boolean primary key default true check (one),
    shards int not null check (shards between 1 and 64),
    payload_bytes_max int not null default 262144,
    installed_at timestamptz not null default clock_timestamp()
);

-- Which text the functions were installed from: they are replaced whole, so one digest tells.
create table durable.functions (
    one boolean primary key default true check (one),
    digest text not null,
    installed_at timestamptz not null default now()
);

-- Locked by each claim, never updated: a lock leaves no dead row behind.
create table durable.shard (
    shard int primary key,
    queue text not null unique,
    queue_id int not null
);

create table durable.slot (
    slot int primary key check (slot between 0 and 1023),
    shard int not null references durable.shard
);

-- A row while consumers of the shard sleep: whoever appends then also notifies.
create table durable.idle (shard int primary key references durable.shard);

create type durable.cursor as (txid xid8, id bigint, line int);

-- One row an open window: who reads it and how far it is done. Inserted by a claim, deleted by the last page.
create table durable.win (
    batch bigint primary key,
    shard int not null references durable.shard,
    owner bigint not null,
    s0 pg_snapshot not null,
    s1 pg_snapshot not null,
    done durable.cursor not null default row('0'::xid8, 0, 0)::durable.cursor,
    takeovers int not null default 0,
    active timestamptz not null
) with (fillfactor = 50);

-- day: the UTC day of the start, in days since 1970; the last 16 bits of the id say it too, so a look-up reads one partition.
create table durable.started (
    id uuid not null,
    day int not null,
    workflow text not null,
    version int not null,
    input text not null,
    key text,
    at timestamptz not null,
    primary key (id, day)
) partition by range (day);
create index on durable.started (at);

create table durable.finished (
    id uuid not null,
    day int not null,
    status text not null check (status in ('completed', 'failed')),
    output text not null,
    at timestamptz not null,
    primary key (id, day)
) partition by range (day);

create table durable.started_default partition of durable.started default;
create table durable.finished_default partition of durable.finished default;

create table durable.key (
    workflow text not null,
    key text not null,
    id uuid not null,
    primary key (workflow, key)
);
