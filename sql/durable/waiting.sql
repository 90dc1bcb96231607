-- What stands still, for people: who waits for what, and what the clock does next. Ids are truncated, payloads are not shown.

-- durable.head_of(line, field): the workflow (f) or the step (s) in the head of an envelope. Cut, not matched by durable.line_pattern: here
-- it is asked of a hundred thousand lines. Of what somebody put there by hand it is some text.
create or replace function durable.head_of(i_line text, i_field text) returns text
language sql immutable parallel safe
as $$ select split_part(substr(i_line, 45, 144), '"', case i_field when 'f' then 4 else 8 end) $$;

-- durable.waiting(…): workflows that stand still, the longest first.
--   i_place     sleeping, waiting (for a signal) or joining (its children), as in durable.locate; null: all of them
--   i_signal    who waits for the signal of this name
--   i_after     the cursor of the last row so far; a page has more rows than i_limit only where they share moment and short id
-- Result: signals: any of these resumes it; due: then it goes on without; step: with which it goes on; needs_token: of a signal, that one
-- which was handed out. children, ended: of the group that it waits for.
-- There is no index by since, which each wait would pay for: the table is read, 200,000 of those that match at the most, and where there
-- are more the first that were found; a table that is mostly appended to has its oldest rows first.
create or replace function durable.waiting(i_place text default null, i_workflow text default null, i_signal text default null,
    i_limit int default 50, i_after text default null)
returns table (id text, place text, workflow text, step text, seq int, signals text[], needs_token boolean, children int, ended int,
    since timestamptz, due timestamptz, cursor text)
language plpgsql stable security definer
set search_path = pg_catalog, durable, pg_temp set synchronize_seqscans = off set jit = off
as $$
begin
    if i_place not in ('sleeping', 'waiting', 'joining') then
        raise exception 'a place to stand still is sleeping, waiting or joining, not %', quote_literal(left(i_place, 40))
            using errcode = 'DC002';
    end if;
    if coalesce(i_limit not between 1 and 1000, true) then
        raise exception 'a limit of % is out of range; choose 1 to 1000', coalesce(i_limit::text, 'null') using errcode = 'DC002';
    end if;
    perform durable.cursor_at(i_after);
    return query
        select durable.short(w.id), case when w.names is null then 'sleeping' when w.names = '{}' then 'joining' else 'waiting' end,
            durable.head_of(w.line, 'f'), durable.head_of(coalesce(w.signal_line, w.line), 's'), w.seq, nullif(w.names, '{}'),
            w.token_seq is not null, f.total, f.completed + f.failed, w.since, nullif(w.due, 'infinity'),
            durable.cursor_of(w.since, durable.short(w.id))
        from (
            select k.* from (
                select m.* from durable.wait m
                where (i_place is null or i_place = case when m.names is null then 'sleeping' when m.names = '{}' then 'joining' else 'waiting' end)
                    and (i_workflow is null or durable.head_of(m.line, 'f') = i_workflow)
                    and (i_signal is null or m.names @> array[i_signal])
                limit 200000) k
            where i_after is null or (k.since, durable.short(k.id)) > (durable.cursor_at(i_after), durable.cursor_short(i_after))
            order by k.since, durable.short(k.id) fetch first i_limit rows with ties) w
        left join durable.fanout f on w.names is not null and f.id = w.id and f.wait_seq is not null
        order by w.since, durable.short(w.id), w.id;
end
$$;

-- durable.waiting_types(): how many stand still, by type and place, of the first 10,000 that are found.
create or replace function durable.waiting_types() returns table (workflow text, place text, workflows bigint)
language sql stable security definer
set search_path = pg_catalog, durable, pg_temp set synchronize_seqscans = off set jit = off
as $$
    select durable.head_of(w.line, 'f'), case when w.names is null then 'sleeping' when w.names = '{}' then 'joining' else 'waiting' end, count(*)
    from (select m.line, m.names from durable.wait m limit 10000) w
    group by 1, 2 order by 3 desc, 1, 2 limit 100
$$;

-- durable.due_next(…): what the clock does next, by its time: ends of sleeps, time-outs of waits, attempts again, delayed starts.
--   i_after  the cursor of the last row so far
-- Result: what: sleep, timeout, retry (attempt is above 1), step (any other that is due within a minute of having been set) or limit (a rate
-- lets the next pass; no workflow of anybody's). A timer whose wait is over is passed over: 5,000 are looked at, and where the limit is not
-- reached by then the last row is a cursor and nothing else.
create or replace function durable.due_next(i_workflow text default null, i_limit int default 50, i_after text default null)
returns table (id text, what text, workflow text, step text, seq int, attempt int, due timestamptz, cursor text)
language plpgsql stable security definer
set search_path = pg_catalog, durable, pg_temp set jit = off
as $$
declare
    v_due timestamptz := '-infinity';
    v_id bigint := 0;
    v_looked int := 0;
    v_found int := 0;
    v_timer record;
begin
    if coalesce(i_limit not between 1 and 1000, true) then
        raise exception 'a limit of % is out of range; choose 1 to 1000', coalesce(i_limit::text, 'null') using errcode = 'DC002';
    end if;
    if i_after is not null then
        if i_after !~ '^[0-9a-f]{1,15}-[0-9a-f]{1,15}$' then
            raise exception 'that is no cursor of what is due next; pass the one of its last row' using errcode = 'DC002';
        end if;
        v_due := 'epoch'::timestamptz + ('x' || lpad(split_part(i_after, '-', 1), 16, '0'))::bit(64)::bigint * interval '1 microsecond';
        v_id := ('x' || lpad(split_part(i_after, '-', 2), 16, '0'))::bit(64)::bigint;
    end if;
    select f.due, f.id into v_due, v_id
    from (select v_due as due, v_id as id union all select c.reached_due, c.reached_id from durable.timer_control c) f
    order by f.due desc, f.id desc limit 1;
    for v_timer in
        select t.* from durable.timer t where (t.due, t.id) > (v_due, v_id) order by t.due, t.id limit 5000
    loop
        v_looked := v_looked + 1;
        cursor := to_hex((extract(epoch from v_timer.due) * 1000000)::bigint) || '-' || to_hex(v_timer.id);
        due := v_timer.due;
        seq := v_timer.seq;
        what := null;
        if v_timer.line is null then
            select case when w.names is null then 'sleep' else 'timeout' end, w.line into what, v_timer.line
            from durable.wait w where w.id = v_timer.workflow_id and w.seq = v_timer.seq;
            continue when not found;
        end if;
        workflow := durable.head_of(v_timer.line, 'f');
        continue when workflow <> i_workflow;
        step := durable.head_of(v_timer.line, 's');
        id := durable.short(v_timer.workflow_id);
        attempt := durable.attempt_of(v_timer.line);
        what := coalesce(what, case when workflow = '@limit' then 'limit' when attempt > 1 then 'retry' else 'step' end);
        if what = 'limit' then
            id := null;
            workflow := null;
        end if;
        return next;
        v_found := v_found + 1;
        exit when v_found >= i_limit;
    end loop;
    if v_found < i_limit and v_looked = 5000 then
        select null, null, null, null, null, null, null into id, what, workflow, step, seq, attempt, due;
        return next;
    end if;
end
$$;
