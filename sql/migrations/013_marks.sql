-- A consumer's sleep is an advisory lock of its session and no row. Run once.
drop function if exists durable.fall_asleep(int);
drop function if exists durable.wake_up(int);
drop table if exists durable.idle;
