-- Finding workflows, watching them, and a record of who did what to them. Run once.

-- What a workflow is found by. One row a workflow that has any.
create table durable.attribute (
    id uuid primary key,
    attributes jsonb not null
);
create index on durable.attribute using gin (attributes jsonb_path_ops);
comment on column durable.attribute.attributes is 'A flat object of strings, numbers and booleans.';

-- What a workflow says of itself while it runs. One row a workflow that ever did.
create table durable.progress (
    id uuid primary key,
    progress text not null,
    at timestamptz not null
) with (fillfactor = 50);

-- The ends that people look for are few among those that went well.
create index on durable.finished (status, at) where status <> 'completed';

-- What happened, and who did it. Only ever inserted, and dropped by the day.
-- day: the UTC day of the row, in days since 1970.
create sequence durable.audit_number;
create table durable.audit (
    day int not null,
    number bigint not null default nextval('durable.audit_number'),
    at timestamptz not null,
    what text not null,
    id text,
    id_hash bytea,
    actor text,
    role text not null,
    details jsonb not null,
    primary key (day, number)
) partition by range (day);
create index on durable.audit (id);
comment on column durable.audit.id is 'The first 12 digits of the workflow''s id; null: it concerns no workflow.';
comment on column durable.audit.id_hash is 'Of the whole id and the database''s secret: who has the id can find its rows, who has the row cannot find the id.';
comment on column durable.audit.actor is 'Who did it, as the caller says.';
comment on column durable.audit.role is 'Who was connected, as the database knows it.';
create table durable.audit_default partition of durable.audit default;

alter table durable.cluster add column audit boolean not null default false;
