-- Replay and fork. Run once.

-- Its answer has more columns now; a function's columns cannot be replaced.
drop function if exists durable.list(text, text, int, text, text, timestamptz, timestamptz, text, text);

alter table durable.started add column origin uuid;
comment on column durable.started.origin is 'The workflow that this one was replayed or forked from; of a child that came along with a fork, the one it is a copy of.';
create index on durable.started (origin) where origin is not null;

alter table durable.finished add column memo text;
comment on column durable.finished.memo is 'What a linear workflow carried at its end: what history and fork read; null: nothing is kept.';

-- What the code that runs says of its workflows: where they begin.
create table durable.workflow_type (
    workflow text primary key,
    version int not null,
    step text not null,
    steps text[] not null,
    is_limited boolean not null
);
comment on column durable.workflow_type.step is 'The first one; workflow.start: a linear workflow.';
comment on column durable.workflow_type.steps is 'All of a machine; none of a linear workflow.';
comment on column durable.workflow_type.is_limited is 'Whether a limit counts its workflows, by the state of the first step.';
