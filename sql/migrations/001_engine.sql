-- The tables of the queue engine: configuration, ticks, subscriptions and batches. Run once.
--
-- Rows that the hot path touches are only ever inserted. Under a held snapshot an updated row grows a chain of dead
-- versions that every look-up walks; an inserted row is found first by an index read from its newest end.

create schema pgque;
comment on schema pgque is 'Queue engine: snapshot ticks, batches, rotation by truncate.';

create sequence pgque.subscription_id_seq as int;
create sequence pgque.batch_id_seq;

-- One row a queue. Updated by configuration and rotation only.
create table pgque.queue (
    queue_id int primary key generated always as identity,
    queue_name text not null unique,
    queue_ntables int not null default 3,
    queue_cur_table int not null default 0,
    queue_rotation_period interval not null default '2 hours',
    queue_switch_time timestamptz not null default clock_timestamp(),
    queue_switch_step1 xid8 not null default pg_current_xact_id(),
    queue_switch_step2 xid8 default pg_current_xact_id(),
    queue_external_ticker boolean not null default false,
    queue_disable_insert boolean not null default false,
    queue_ticker_paused boolean not null default false,
    queue_ticker_max_count int not null default 500,
    queue_ticker_max_lag interval not null default '3 seconds',
    queue_ticker_idle_period interval not null default '1 minute',
    queue_max_retries int not null default 5,
    queue_data_pfx text not null,
    queue_event_seq text not null,
    queue_rotation_seq text not null,
    queue_rotations bigint not null default 0,
    check (octet_length(queue_name) between 1 and 57)
);
comment on column pgque.queue.queue_switch_step2 is
    'Transaction id of step 2 of the last rotation: every writer that still saw the table before it has a lower one. Null between the two steps.';
comment on column pgque.queue.queue_rotations is
    'Rotations so far; queue_rotation_seq holds the same number outside MVCC, for producers whose snapshot is older than a rotation.';

-- A tick is a snapshot with a number; the events between two ticks are a batch. Insert-only, trimmed in bulk by maint().
create table pgque.tick (
    tick_queue int not null,
    tick_id bigint not null,
    tick_time timestamptz not null,
    tick_snapshot pg_snapshot not null,
    tick_event_seq bigint not null,
    primary key (tick_queue, tick_id)
);

create table pgque.consumer (
    co_id int primary key generated always as identity,
    co_name text not null unique
);

-- One row a consumer and queue; the members of a cooperative group share the sub_id of their main row.
-- Updated by registration, conversion and heartbeats, never by a batch.
create table pgque.subscription (
    sub_queue int not null references pgque.queue,
    sub_consumer int not null references pgque.consumer,
    sub_id int not null,
    sub_role text not null default 'normal' check (sub_role in ('normal', 'coop_main', 'coop_member')),
    sub_start_tick bigint not null,
    sub_active timestamptz not null default clock_timestamp(),
    primary key (sub_queue, sub_consumer)
) with (fillfactor = 50);
create unique index subscription_main on pgque.subscription (sub_id) where sub_role <> 'coop_member';
create index subscription_id on pgque.subscription (sub_id);
comment on column pgque.subscription.sub_start_tick is
    'Where the subscription began; once it has had a batch, the greatest batch_next_tick says where it stands.';

-- A batch handed out: who holds which window. Insert-only; ended by a row in batch_end.
create table pgque.batch (
    batch_id bigint primary key default nextval('pgque.batch_id_seq'),
    batch_sub int not null,
    batch_member int not null,
    batch_prev_tick bigint not null,
    batch_next_tick bigint not null,
    batch_opened timestamptz not null default clock_timestamp()
);
create index batch_reached on pgque.batch (batch_sub, batch_next_tick);
create index batch_holder on pgque.batch (batch_sub, batch_member, batch_id);

-- Its primary key decides the race between a finish and a takeover: one row a batch, whoever comes first.
create table pgque.batch_end (
    batch_id bigint primary key,
    end_time timestamptz not null default clock_timestamp(),
    end_how text not null check (end_how in ('finished', 'taken'))
);
