-- The audit: what happened to workflows, when, and who did it. Off unless somebody sets it on. A row says no more of a workflow than its
-- first 12 digits and a hash: who has the id finds the rows of its workflow, who has the rows does not find the id. No payloads.
-- Rows are written in the transaction of what they tell of, and stand or fall with it.

-- durable.id_hash(id, secret): what stands for a workflow: made with the database's secret, and so of no use elsewhere.
create or replace function durable.id_hash(i_id uuid, i_secret bytea) returns bytea
language sql immutable
as $$ select sha256(i_secret || sha256(i_secret || convert_to('audit:' || durable.hex(i_id), 'UTF8'))) $$;

-- durable.record(what, ids, actor, details): a row for each of these workflows, if the audit is on; details one of each, or none.
--   i_actor  who did it, as the caller says; null: as the session says (set durable.actor = '…')
-- For functions that run as the owner: nobody else may write. Tables: audit.
create or replace function durable.record(i_what text, i_ids uuid[], i_actor text default null, i_details jsonb[] default null)
returns void
language plpgsql
set search_path = pg_catalog, durable, pg_temp
as $$
declare
    v_now timestamptz;
    v_secret bytea;
begin
    if not (select c.audit from durable.cluster c) then
        return;
    end if;
    v_now := durable.now();
    v_secret := (select s.secret from durable.secret s);
    insert into durable.audit (day, at, what, id, id_hash, actor, role, details)
    select durable.day_at(v_now), v_now, i_what, durable.short(q.id), durable.id_hash(q.id, v_secret),
        coalesce(i_actor, left(nullif(current_setting('durable.actor', true), ''), 255)), session_user, coalesce(q.details, '{}')
    from unnest(i_ids, i_details) q(id, details);
end
$$;

-- durable.set_audit(on, actor): from now on, and for everybody. Either is recorded. For the owner of the schema.
create or replace function durable.set_audit(i_on boolean, i_actor text default null) returns void
language plpgsql
set search_path = pg_catalog, durable, pg_temp
as $$
begin
    perform durable.checked_label('actor', i_actor, 255);
    if i_on then
        update durable.cluster set audit = true;
        perform durable.add_day('audit', d) from generate_series(durable.today(), durable.today() + 14) d;
    end if;
    perform durable.record(case when i_on then 'audit_on' else 'audit_off' end, array[null::uuid], i_actor);
    update durable.cluster set audit = i_on;
end
$$;

-- durable.audit_list(…): what happened, newest first.
--   i_id    the first digits of an id; with all 32, the rows of that very workflow
create or replace function durable.audit_list(i_id text default null, i_actor text default null, i_what text default null,
    i_since timestamptz default null, i_limit int default 50)
returns table (at timestamptz, what text, id text, actor text, role text, details jsonb)
language plpgsql stable security definer
set search_path = pg_catalog, durable, pg_temp
as $$
declare
    v_digits text := durable.first_digits(i_id);
    v_hash bytea := case when length(replace(i_id, '-', '')) = 32
        then durable.id_hash(i_id::uuid, (select s.secret from durable.secret s)) end;
begin
    return query execute
        'select a.at, a.what, a.id, a.actor, a.role, a.details from durable.audit a where true'
        || case when v_digits is not null then ' and a.id >= $1 and a.id < $1 || ''g''' else '' end
        || case when v_hash is not null then ' and a.id_hash = $2' else '' end
        || case when i_actor is not null then ' and a.actor = $3' else '' end
        || case when i_what is not null then ' and a.what = $4' else '' end
        || case when i_since is not null then ' and a.at >= $5 and a.day >= $7' else '' end
        || ' order by a.day desc, a.number desc limit $6'
        using v_digits, v_hash, i_actor, i_what, i_since, i_limit, durable.day_at(i_since);
end
$$;

-- durable.audit_page(since, before, day, number, limit): rows to be taken elsewhere, oldest first: those after this day and number.
create or replace function durable.audit_page(i_since timestamptz, i_before timestamptz, i_day int, i_number bigint, i_limit int)
returns table (day int, number bigint, at timestamptz, what text, id text, id_hash text, actor text, role text, details jsonb)
language plpgsql stable security definer
set search_path = pg_catalog, durable, pg_temp set plan_cache_mode = force_custom_plan
as $$
#variable_conflict use_column
begin
    return query
        select a.day, a.number, a.at, a.what, a.id, encode(a.id_hash, 'hex'), a.actor, a.role, a.details from durable.audit a
        where a.day >= i_day and (a.day, a.number) > (i_day, i_number)
            and a.at >= coalesce(i_since, '-infinity') and a.at < coalesce(i_before, 'infinity')
        order by a.day, a.number limit i_limit;
end
$$;

-- durable.is_audited(): whether the audit is on. durable.audit_reaches_back(): the day of its oldest rows; null: there are none.
create or replace function durable.is_audited() returns boolean
language sql stable security definer
set search_path = pg_catalog, durable, pg_temp
as $$ select c.audit from durable.cluster c $$;

create or replace function durable.audit_reaches_back() returns timestamptz
language sql stable security definer
set search_path = pg_catalog, durable, pg_temp
as $$ select a.at from durable.audit a order by a.day, a.number limit 1 $$;

-- durable.expired_audit(days): the oldest day of the audit that has a partition and is over by more than so many days; null: none.
create or replace function durable.expired_audit(i_days int) returns int
language sql stable
set search_path = pg_catalog, durable, pg_temp
as $$
    select min(p.day) from (
        select substring(c.relname from '_([0-9]+)$')::int as day
        from pg_inherits i join pg_class c on c.oid = i.inhrelid where i.inhparent = 'durable.audit'::regclass) p
    where p.day < durable.today() - i_days
$$;

-- durable.needs_audit_upkeep(days): a read that tells whether durable.keep_audit has something to do.
create or replace function durable.needs_audit_upkeep(i_days int) returns boolean
language sql stable security definer
set search_path = pg_catalog, durable, pg_temp
as $$
    select (durable.is_audited() and to_regclass('durable.audit_' || (durable.today() + 7)) is null)
        or durable.expired_audit(i_days) is not null
        or exists (select from durable.audit_default a where a.day < (select durable.today() - i_days))
$$;

-- durable.keep_audit(days): partitions ahead while the audit is on, and one expired day gone. How many days were made or dropped.
-- The caller sets lock_timeout: who reads or writes holds a lock that a drop waits for.
create or replace function durable.keep_audit(i_days int) returns int
language plpgsql security definer
set search_path = pg_catalog, durable, pg_temp
as $$
declare
    v_day int := durable.expired_audit(i_days);
    v_done int := 0;
begin
    if i_days is null or i_days not between 1 and 36500 then
        raise exception 'an audit of % days is out of range; choose 1 to 36500', coalesce(i_days::text, 'null') using errcode = 'DC002';
    end if;
    if not durable.try_maintenance('audit') then
        return 0;
    end if;
    if durable.is_audited() then
        select sum(durable.add_day('audit', d)) into v_done from generate_series(durable.today(), durable.today() + 14) d;
    end if;
    if v_day is not null then
        execute format('drop table durable.audit_%s', v_day);
        v_done := v_done + 1;
    end if;
    delete from durable.audit_default a where a.day < durable.today() - i_days;
    return v_done;
end
$$;
