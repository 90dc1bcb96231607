-- The timeline: what the steps of recorded workflows came to, projected from the log by a second reader. Run once.

-- Their arguments are more now.
drop function if exists durable.declare_types(text, text, text, text, text);
drop function if exists durable.window_query(text[], boolean, int);
drop function if exists durable.keep_up();

alter table durable.workflow_type add column history float8 not null default 0 check (history between 0 and 1);
comment on column durable.workflow_type.history is 'Which part of its workflows is recorded; 0: none, 1: all.';

-- Only ever inserted, by durable.project_timeline; partitioned by the day of the row, and dropped by the day.
create table durable.timeline (
    day int not null,
    id uuid not null,
    seq int not null,
    part int not null,
    step text not null,
    attempt int not null,
    enqueued_at timestamptz,
    began_at timestamptz,
    ended_at timestamptz,
    outcome text not null,
    error text,
    waits_for text,
    until timestamptz,
    shard int not null,
    process text
) partition by range (day);
create index on durable.timeline (id, seq);
comment on column durable.timeline.part is '0: the step event; from 1 on: the steps of a linear workflow that ran within it.';
comment on column durable.timeline.enqueued_at is 'When the step event stood in the log; null where nobody knows it any more.';
comment on column durable.timeline.began_at is 'When its handler began; null: it did not run.';
comment on column durable.timeline.ended_at is 'When it ended; of one that did not run, when that was decided; null: it goes on beside the pages.';
comment on column durable.timeline.outcome is 'See durable.timeline_of.';
create table durable.timeline_default partition of durable.timeline default;

-- What a reader that was too far behind has left out.
create table durable.timeline_skip (
    shard int not null,
    since timestamptz not null,
    until timestamptz not null,
    records bigint,
    at timestamptz not null
);
comment on column durable.timeline_skip.records is 'How many steps are missing from the timeline; null: more than were counted.';
