-- What the page shows and the workflow decides. This file can be run again at any time.

create schema if not exists approvals;

create table if not exists approvals.purchase (
    ref text primary key,
    asked_by text not null,
    what text not null,
    amount numeric(14, 2) not null,
    status text not null default 'open' check (status in ('open', 'approved', 'rejected', 'expired')),
    decided_by text,
    decided_at timestamptz,
    note text
);

-- Who may answer. Of a link only its digest is kept: who reads this table can neither open the page nor answer.
create table if not exists approvals.link (
    digest bytea primary key,
    ref text not null references approvals.purchase,
    approver text not null,
    is_open boolean not null default true
);

-- Stands for the mails that were sent: the link in them is the secret.
create table if not exists approvals.letter (
    number bigint generated always as identity primary key,
    ref text not null references approvals.purchase,
    approver text not null,
    kind text not null check (kind in ('question', 'reminder')),
    path text not null,
    unique (ref, approver, kind)
);
