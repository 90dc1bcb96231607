-- A start may say who asked for it. Run once.

-- These have a parameter more now: beside them the old ones would make each call ambiguous, or be taken for them.
drop function if exists durable.start(text, int, text, text, text, interval, text);
drop function if exists durable.start_many(text, int, text, text, text, interval, text);
drop function if exists durable.line_middle(int, text, text, int);
