-- What linear workflows have on record and do not carry in each step event. Run once.

-- Its answer has more columns now; a function's columns cannot be replaced.
drop function if exists durable.maintain(int);

-- Chunks of memos are only ever inserted. Three tables take turns: the current one, the one before it, and an empty one.
create sequence durable.spill_at;
create table durable.spill_0 (
    id uuid not null,
    number int not null,
    ref bigint not null,
    at bigint not null default nextval('durable.spill_at'),
    body text
);
comment on column durable.spill_0.number is 'Which chunk of the workflow''s memo this is, from 0. Older rows with this number or a higher one count no more.';
comment on column durable.spill_0.ref is 'What step events call it; random.';
comment on column durable.spill_0.at is 'The order in which the rows of a workflow were written; kept when they are carried.';
comment on column durable.spill_0.body is 'The chunk; null: the memo has none of this number any more.';
create index on durable.spill_0 (id, at);
create table durable.spill_1 (like durable.spill_0 including all);
create table durable.spill_2 (like durable.spill_0 including all);
create view durable.spill as
select * from durable.spill_0 union all select * from durable.spill_1 union all select * from durable.spill_2;

-- One row. Updated by rotation, never by a chunk.
create table durable.spill_control (
    one boolean primary key default true check (one),
    current int not null default 0 check (current between 0 and 2)
);
insert into durable.spill_control default values;
