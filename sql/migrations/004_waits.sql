-- Waiting for signals, and cancel. Run once.

-- Its answer has more columns now; a function's columns cannot be replaced.
drop function if exists durable.asides();
drop function if exists durable.schedule(text, text);

alter table durable.wait
    add column names text[],
    add column signal_line text,
    add column token_seq int;
comment on column durable.wait.names is 'The signals that resume it; null: a sleep, which only its timer ends.';
comment on column durable.wait.line is 'The step event to append when its time is over.';
comment on column durable.wait.signal_line is 'The step event to append, with the signal in it, when one comes; null: that of line.';
comment on column durable.wait.token_seq is 'Which token a signal must bring; null: none.';

-- Signals that nobody waits for yet, in the order of their delivery.
create sequence durable.mailbox_number;
create table durable.mailbox (
    id uuid not null,
    number bigint not null default nextval('durable.mailbox_number'),
    name text not null,
    event text not null,
    token_seq int,
    primary key (id, number)
);

-- What a live workflow must not take twice: the idempotency keys of its signals, and its tokens that were used.
create table durable.signal_key (
    id uuid not null,
    key text not null,
    primary key (id, key)
);
create table durable.used_token (
    id uuid not null,
    seq int not null,
    primary key (id, seq)
);

-- What tokens are made with. One row, read by nobody but functions.
create table durable.secret (
    one boolean primary key default true check (one),
    secret bytea not null
);
insert into durable.secret (secret)
values (sha256(uuid_send(gen_random_uuid()) || uuid_send(gen_random_uuid()) || uuid_send(gen_random_uuid())));

-- Workflows that were asked to end and have not ended. cleanup steps run meanwhile.
create table durable.cancelled (
    id uuid primary key,
    reason text not null,
    actor text,
    at timestamptz not null
);
do $$
declare
    v_table regclass;
begin
    alter table durable.finished drop constraint finished_status_check;
    -- A day's partition was made by itself and has the old check as its own.
    for v_table in select i.inhrelid::regclass from pg_inherits i where i.inhparent = 'durable.finished'::regclass loop
        execute format('alter table %s drop constraint if exists finished_status_check', v_table);
    end loop;
    alter table durable.finished add constraint finished_status_check check (status in ('completed', 'failed', 'cancelled'));
end
$$;

alter table durable.cluster add column mailbox_max int not null default 1000;
