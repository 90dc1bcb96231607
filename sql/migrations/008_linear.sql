-- Linear workflows. Run once.

-- Its arguments are more now.
drop function if exists durable.spawn(text, text, text, text, text, text, text, text, text);

-- A linear workflow awaits its children one by one, in any order: all that it ever spawned are one group.
alter table durable.fanout add column keeps boolean not null default false;
comment on column durable.fanout.keeps is 'Children spawned after a wait belong to the group too.';
