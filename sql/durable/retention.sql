-- A workflow goes once it has been finished for so many days, and its parent does not wait for it any more. Its day's partitions are dropped whole; what lives longer than its
-- day is carried into the default partitions first, where look-ups by id land by themselves when the day has no partition left.
-- Carried are the rows that have not been finished for long enough: as many as are alive at one time, however long history is.

-- durable.expired_day(days): the oldest day that has partitions and is over by more than so many days; null: none.
create or replace function durable.expired_day(i_days int) returns int
language sql stable
set search_path = pg_catalog, durable, pg_temp
as $$
    select min(p.day) from (
        select substring(c.relname from '_([0-9]+)$')::int as day
        from pg_inherits i join pg_class c on c.oid = i.inhrelid
        where i.inhparent in ('durable.started'::regclass, 'durable.finished'::regclass)) p
    where p.day < durable.today() - i_days
$$;

-- durable.expired_before(days): what finished earlier may go. Hours, because a day of the session's time zone may have 23.
create or replace function durable.expired_before(i_days int) returns timestamptz
language sql stable
set search_path = pg_catalog, durable, pg_temp
as $$ select durable.now() - make_interval(hours => 24 * i_days) $$;

-- durable.needs_expiry(days): a read that tells whether durable.expire has something to do.
create or replace function durable.needs_expiry(i_days int) returns boolean
language sql stable security definer
set search_path = pg_catalog, durable, pg_temp
as $$
    select durable.expired_day(i_days) is not null
        or exists (select 1 from durable.finished_default f
                   where f.at < (select durable.expired_before(i_days)) and not durable.is_awaited(f.id))
$$;

-- durable.forget(ids): what signals, joins, attributes and progress left behind of these workflows.
create or replace function durable.forget(i_ids uuid[]) returns void
language sql volatile
set search_path = pg_catalog, durable, pg_temp
as $$
    delete from durable.mailbox m where m.id = any (i_ids);
    delete from durable.signal_key k where k.id = any (i_ids);
    delete from durable.used_token u where u.id = any (i_ids);
    delete from durable.fanout f where f.id = any (i_ids);
    delete from durable.priority p where p.id = any (i_ids);
    delete from durable.attribute a where a.id = any (i_ids);
    delete from durable.progress p where p.id = any (i_ids);
$$;

-- durable.remembered(day): the workflows of that day of which any of that is left.
create or replace function durable.remembered(i_day int) returns setof uuid
language sql stable
set search_path = pg_catalog, durable, pg_temp
as $$
    select q.id from (select m.id from durable.mailbox m union select k.id from durable.signal_key k
                      union select u.id from durable.used_token u union select f.id from durable.fanout f
                      union select a.id from durable.attribute a union select p.id from durable.progress p
                      union select y.id from durable.priority y) q
    where durable.day_of(q.id) = i_day
$$;

-- durable.drop_day(day, before, rows): drops the partitions of a day; what has not been finished since before is carried. Whether
-- it did: with so many keys to delete it leaves the rest for the next call.
-- Detaching locks the two tables against everybody, so what takes time is done ahead: nobody may start on that day any more while
-- its workflows are read. They may finish: whoever was alive at the reading is carried with all its rows, the end included.
create or replace function durable.drop_day(i_day int, i_before timestamptz, i_rows_max int) returns boolean
language plpgsql
set search_path = pg_catalog, durable, pg_temp
as $$
declare
    v_names text[] := array(select n from unnest(array['started', 'finished']) n
                            where to_regclass(format('durable.%s_%s', n, i_day)) is not null);
    v_name text;
    v_kept uuid[];
begin
    if 'started' = any (v_names) then
        execute format('lock table durable.started_%s in share mode', i_day);
    end if;
    v_kept := array(
        select s.id from durable.started s left join durable.finished f on f.id = s.id and f.day = s.day
        where s.day = i_day and (coalesce(f.at, 'infinity') >= i_before or (s.parent is not null and durable.is_awaited(s.id))));
    if durable.forget_keys(i_day, v_kept, i_rows_max) = i_rows_max then
        return false;
    end if;
    perform durable.forget(array(select i from durable.remembered(i_day) i where i <> all (v_kept)));
    foreach v_name in array v_names loop
        execute format('alter table durable.%1$s detach partition durable.%1$s_%2$s', v_name, i_day);
    end loop;
    foreach v_name in array v_names loop
        execute format('insert into durable.%1$s_default select r.* from durable.%1$s_%2$s r where r.id = any ($1)', v_name, i_day)
            using v_kept;
        execute format('drop table durable.%s_%s', v_name, i_day);
    end loop;
    return true;
end
$$;

-- durable.forget_keys(day, kept, rows): deletes the keys of that day's workflows but the kept ones; how many, rows at most.
-- A key that stands for another workflow by now stays.
create or replace function durable.forget_keys(i_day int, i_kept uuid[], i_rows_max int) returns int
language plpgsql
set search_path = pg_catalog, durable, pg_temp
as $$
declare
    v_gone int;
begin
    delete from durable.key k using (
        select q.workflow, q.key, q.id
        from durable.started s join durable.key q on q.workflow = s.workflow and q.key = s.key and q.id = s.id
        where s.day = i_day and s.id <> all (i_kept) limit i_rows_max) g
    where k.workflow = g.workflow and k.key = g.key and k.id = g.id;
    get diagnostics v_gone = row_count;
    return v_gone;
end
$$;

-- durable.expire_carried(before, rows): deletes from the default partitions what finished before, with its keys; how many ends,
-- rows at most.
create or replace function durable.expire_carried(i_before timestamptz, i_rows_max int) returns int
language plpgsql
set search_path = pg_catalog, durable, pg_temp
as $$
declare
    v_gone int;
    v_ids uuid[];
begin
    with ended as (
        delete from durable.finished_default f
        where (f.id, f.day) in (
            select o.id, o.day from durable.finished_default o
            where o.at < i_before and not durable.is_awaited(o.id) order by o.at limit i_rows_max)
        returning f.id, f.day
    ), begun as (
        delete from durable.started_default s using ended e where s.id = e.id and s.day = e.day
        returning s.workflow, s.key, s.id
    ), keys as (
        delete from durable.key k using begun b where k.workflow = b.workflow and k.key = b.key and k.id = b.id
    )
    select count(*), array_agg(e.id) into v_gone, v_ids from ended e;
    perform durable.forget(v_ids);
    return v_gone;
end
$$;

-- durable.expire(days, rows): one thing a call, so that transactions stay short: the oldest expired day, or so many of its keys
-- while it has more than that, or, with no day left to drop, so many of the carried. How many days were dropped: 0 or 1.
-- The caller sets lock_timeout: a reader that holds on (55P03) leaves everything as it was.
create or replace function durable.expire(i_days int, i_rows_max int default 100000) returns int
language plpgsql security definer
set search_path = pg_catalog, durable, pg_temp
as $$
declare
    v_day int;
begin
    perform durable.demand_read_committed();
    if i_days is null or i_days not between 1 and 36500 then
        raise exception 'retention of % days is out of range; choose 1 to 36500', coalesce(i_days::text, 'null')
            using errcode = 'DC002';
    end if;
    if not durable.try_maintenance('expire') then
        return 0;
    end if;
    v_day := durable.expired_day(i_days);
    if v_day is null then
        perform durable.expire_carried(durable.expired_before(i_days), i_rows_max);
        return 0;
    end if;
    return durable.drop_day(v_day, durable.expired_before(i_days), i_rows_max)::int;
end
$$;
