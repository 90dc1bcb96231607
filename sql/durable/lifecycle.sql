-- durable.checked_name(what, name): the name if it is one, else DC002.
create or replace function durable.checked_name(i_what text, i_name text) returns text
language plpgsql immutable
set search_path = pg_catalog, durable, pg_temp
as $$
begin
    if i_name is null or i_name !~ '^[a-z0-9_.-]{1,57}$' then
        raise exception '% name % is not of [a-z0-9_.-], 1 to 57 characters', i_what, coalesce(quote_literal(left(i_name, 80)), 'null')
            using errcode = 'DC002';
    end if;
    return i_name;
end
$$;

-- durable.checked_payloads(payloads): each one line of valid JSON within the limit, else DC002.
-- In valid JSON a raw newline stands only between tokens, so a space may take its place.
create or replace function durable.checked_payloads(i_payloads text[]) returns text[]
language plpgsql stable
set search_path = pg_catalog, durable, pg_temp
as $$
declare
    v_max int := (select c.payload_bytes_max from durable.cluster c);
    v_parsed json;
begin
    for v_n in 1 .. coalesce(cardinality(i_payloads), 0) loop
        if octet_length(i_payloads[v_n]) > v_max then
            raise exception 'the payload has % bytes, the limit is %; store it elsewhere and pass a reference',
                octet_length(i_payloads[v_n]), v_max using errcode = 'DC002';
        end if;
        v_parsed := i_payloads[v_n];
        if i_payloads[v_n] ~ '\\u[dD][89a-fA-F]' then
            -- Half a surrogate pair passes as json; no worker could read the step event. jsonb refuses it, but also \u0000, which is fine.
            perform regexp_replace(i_payloads[v_n], '(?<!\\)((?:\\\\)*)\\u0000', '\1', 'g')::jsonb;
        end if;
        i_payloads[v_n] := translate(i_payloads[v_n], E'\n\r', '  ');
    end loop;
    return i_payloads;
exception when invalid_text_representation then
    raise exception 'the payload is not JSON: %', sqlerrm using errcode = 'DC002';
end
$$;

-- durable.checked_payload(payload): the same for one.
create or replace function durable.checked_payload(i_payload text) returns text
language sql stable
as $$ select (durable.checked_payloads(array[i_payload]))[1] $$;

-- durable.checked_traceparent(traceparent): of a W3C traceparent what a link needs, in the form of version 00; null for what is none, as
-- that standard demands: a header of a stranger's must not keep a workflow from starting.
create or replace function durable.checked_traceparent(i_traceparent text) returns text
language sql immutable strict
as $$
    select '00' || substr(i_traceparent, 3, 53)
    where i_traceparent ~ '^(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(-.*)?$'
        and (length(i_traceparent) = 55 or i_traceparent !~ '^00')
$$;

-- durable.line(…): the envelope of one step event. Names are checked, ids are hex, the state is JSON: nothing needs escaping.
-- What stands between id and state is the same for many: durable.line_middle.
--   i_traceparent  of the caller, in the line of a first step: the workflow's trace gets a link to it
create or replace function durable.line_middle(i_seq int, i_workflow text, i_step text, i_version int, i_traceparent text default null)
returns text
language sql immutable
as $$
    select '","n":' || i_seq::text || ',"f":"' || i_workflow || '","s":"' || i_step || '","v":' || i_version::text
        || coalesce(',"t":"' || i_traceparent || '"', '') || ',"d":'
$$;

create or replace function durable.line(i_id uuid, i_middle text, i_state text) returns text
language sql immutable
as $$ select '{"w":"' || encode(uuid_send(i_id), 'hex') || i_middle || i_state || '}' $$;

create or replace function durable.line(i_id uuid, i_seq int, i_workflow text, i_step text, i_version int, i_state text) returns text
language sql immutable
as $$ select durable.line(i_id, durable.line_middle(i_seq, i_workflow, i_step, i_version), i_state) $$;

-- durable.append(shard, lines, n): one event of n lines; wakes the shard if it sleeps.
-- The engine assigns the transaction id before it resolves the table (see insert_event).
create or replace function durable.append(i_shard int, i_lines text, i_n int) returns void
language plpgsql
set search_path = pg_catalog, durable, pg_temp
as $$
begin
    perform pgque.insert_event(durable.queue_of(i_shard), 'steps', i_lines, i_n::text, null, null, null);
    -- Later than the insert; a consumer that falls asleep between the two finds the event by its own poll.
    if durable.is_asleep(i_shard) then
        perform pg_notify(durable.queue_of(i_shard), '');
    end if;
end
$$;

-- durable.append_lines(ids, lines): step events of many workflows to their shards, in log entries of at most 1,000 lines and
-- about 1 MiB.
create or replace function durable.append_lines(i_ids uuid[], i_lines text[]) returns void
language sql volatile
set search_path = pg_catalog, durable, pg_temp
as $$
    select durable.append(c.shard, array_to_string(c.lines, E'\n'), cardinality(c.lines)) from (
        select a.shard, a.lines[first : first + a.size - 1] as lines from (
            select s.shard, array_agg(q.line) lines, greatest(1, least(1000, 1048576 / max(octet_length(q.line)))) size
            from unnest(i_ids, i_lines) q(id, line) join durable.slot s on s.slot = durable.slot_of(q.id)
            group by s.shard) a, generate_series(1, cardinality(a.lines), a.size) first
        order by a.shard, first) c
$$;

-- durable.start(…): one workflow, in the caller's transaction, at any isolation level.
--   i_after       how long until its first step is delivered; it counts as started at once
--   i_attributes  JSON: what it is found by (see durable.checked_attributes)
--   i_traceparent the caller's span, as W3C has it: the workflow's trace gets a link to it; what is no traceparent is ignored
-- Result: the id (whole: this is the one answer that gives it) and whether it is new; the same key gives the same workflow.
-- Tables: key, started, attribute if it has any (one row each), the shard's log (one event) or a timer. Errors: DC002, 40001 (a snapshot older than a rotation).
create or replace function durable.start(i_workflow text, i_version int, i_step text, i_input text, i_key text default null,
    i_after interval default null, i_attributes text default null, i_traceparent text default null, out id uuid, out is_new boolean)
language plpgsql security definer
set search_path = pg_catalog, durable, pg_temp
as $$
declare
    v_input text;
    v_line text;
    v_known uuid;
    v_attributes jsonb := durable.checked_attributes(i_attributes);
    v_after_ms float8 := durable.checked_delay_ms(coalesce(extract(epoch from i_after) * 1000, 0)::float8);
begin
    perform durable.checked_name('workflow', i_workflow), durable.checked_name('step', i_step);
    v_input := durable.checked_payload(i_input);
    id := durable.new_id();
    is_new := true;
    if i_key is not null then
        perform durable.checked_key(i_key);
        loop
            insert into durable.key (workflow, key, id) values (i_workflow, i_key, start.id) on conflict do nothing;
            exit when found;
            select k.id, false into v_known, start.is_new from durable.key k where k.workflow = i_workflow and k.key = i_key;
            if found then
                start.id := v_known;
                return;
            end if;
            is_new := true;  -- retention took the key between the two statements
        end loop;
    end if;
    insert into durable.started (id, day, workflow, version, input, key, at)
    values (start.id, durable.day_of(start.id), i_workflow, i_version, v_input, i_key, durable.now());
    v_line := durable.line(start.id,
        durable.line_middle(1, i_workflow, i_step, i_version, durable.checked_traceparent(i_traceparent)), v_input);
    if v_after_ms > 0 then
        perform durable.set_timers(array[start.id], array[1], array[v_line], array[v_after_ms]);
    else
        perform durable.append(s.shard, v_line, 1) from durable.slot s where s.slot = durable.slot_of(start.id);
    end if;
    if v_attributes is not null then
        perform durable.keep_attributes(array[start.id], array[v_attributes]);
    end if;
    if (select c.audit from durable.cluster c) then
        perform durable.record('start', array[start.id], null, array[jsonb_build_object('workflow', i_workflow)]);
    end if;
end
$$;

-- durable.checked_key(key): 1 to 255 characters without control characters, else DC002.
create or replace function durable.checked_key(i_key text) returns text
language plpgsql immutable
set search_path = pg_catalog, durable, pg_temp
as $$
begin
    if length(i_key) not between 1 and 255 or i_key ~ '[[:cntrl:]]' then
        raise exception 'a key has 1 to 255 characters and no control characters (this one has %)', length(i_key)
            using errcode = 'DC002';
    end if;
    return i_key;
end
$$;

-- durable.start_many(…): as start, for many inputs (JSON, one a line; keys likewise, or null), set-wise. Attributes: one object a line, or
-- one for all. One traceparent for all.
-- Result: one row an input, in order. Lines of one shard are appended in events of at most 1,000 lines and about 1 MiB.
create or replace function durable.start_many(i_workflow text, i_version int, i_step text, i_inputs text, i_keys text default null,
    i_after interval default null, i_attributes text default null, i_traceparent text default null)
returns table (id uuid, is_new boolean)
language plpgsql security definer
set search_path = pg_catalog, durable, pg_temp
as $$
#variable_conflict use_column
declare
    v_inputs text[] := durable.checked_payloads(string_to_array(i_inputs, E'\n'));
    v_now timestamptz := durable.now();
    v_ids uuid[] := array(select durable.new_id(v_now) from generate_series(1, cardinality(v_inputs)));
    v_keys text[] := string_to_array(i_keys, E'\n');
    v_new boolean[] := array_fill(true, array[cardinality(v_ids)]);
    v_known uuid[];
    v_middle text := durable.line_middle(1, i_workflow, i_step, i_version, durable.checked_traceparent(i_traceparent));
    v_attributes jsonb[] := case when i_attributes is not null then array(
        select durable.checked_attributes(a) from string_to_table(i_attributes, E'\n') with ordinality q(a, o) order by q.o) end;
    v_after_ms float8 := durable.checked_delay_ms(coalesce(extract(epoch from i_after) * 1000, 0)::float8);
begin
    perform durable.checked_name('workflow', i_workflow), durable.checked_name('step', i_step);
    if cardinality(v_attributes) = 1 then
        v_attributes := array_fill(v_attributes[1], array[cardinality(v_ids)]);
    elsif cardinality(v_attributes) <> cardinality(v_inputs) then
        raise exception '% attributes for % inputs; give one object a piece, or one for all', cardinality(v_attributes), cardinality(v_inputs)
            using errcode = 'DC002';
    end if;
    if i_keys is not null and cardinality(v_keys) <> cardinality(v_inputs) then
        raise exception '% keys for % inputs; give one a piece', cardinality(v_keys), cardinality(v_inputs) using errcode = 'DC002';
    end if;
    if i_keys is not null then
        perform durable.checked_key(k) from unnest(v_keys) k;
        -- Sorted, so that two clients with the same keys wait for each other in one order.
        loop
            insert into durable.key (workflow, key, id)
            select i_workflow, q.k, q.i from unnest(v_keys, v_ids) with ordinality q(k, i, o) order by q.k, q.o on conflict do nothing;
            select array_agg(k.id order by q.o), array_agg(k.id = v_ids[q.o] order by q.o) into v_known, v_new
            from unnest(v_keys) with ordinality q(k, o) join durable.key k on k.workflow = i_workflow and k.key = q.k;
            exit when coalesce(cardinality(v_known), 0) = cardinality(v_keys);  -- else retention took a key between the two statements
        end loop;
        v_ids := v_known;
    end if;
    insert into durable.started (id, day, workflow, version, input, key, at)
    select q.i, durable.day_of(q.i), i_workflow, i_version, q.d, q.k, durable.now()
    from unnest(v_ids, v_inputs, v_new, v_keys) q(i, d, is_new, k) where q.is_new;
    if v_attributes is not null then
        perform durable.keep_attributes(array_agg(q.i), array_agg(q.a)) from unnest(v_ids, v_attributes, v_new) q(i, a, is_new) where q.is_new;
    end if;
    if (select c.audit from durable.cluster c) then
        perform durable.record('start', array_agg(q.i), null, array_agg(jsonb_build_object('workflow', i_workflow)))
        from unnest(v_ids, v_new) q(i, is_new) where q.is_new;
    end if;
    if v_after_ms > 0 then
        perform durable.set_timers(array_agg(q.i), array_agg(1), array_agg(durable.line(q.i, v_middle, q.d)), array_agg(v_after_ms))
        from unnest(v_ids, v_inputs, v_new) q(i, d, is_new) where q.is_new;
        return query select q.i, q.n from unnest(v_ids, v_new) with ordinality q(i, n, o) order by q.o;
        return;
    end if;
    perform durable.append_lines(array_agg(q.i), array_agg(durable.line(q.i, v_middle, q.d)))
    from unnest(v_ids, v_inputs, v_new) q(i, d, is_new) where q.is_new;
    return query select q.i, q.n from unnest(v_ids, v_new) with ordinality q(i, n, o) order by q.o;
end
$$;

-- durable.find(workflow, key): the id a key stands for, or null.
create or replace function durable.find(i_workflow text, i_key text) returns uuid
language sql stable security definer
set search_path = pg_catalog, durable, pg_temp
as $$ select k.id from durable.key k where k.workflow = i_workflow and k.key = i_key $$;

-- durable.state_of(id): one row for a known workflow, none for an unknown one. status: 'running' until it is finished, 'stuck' while
-- a dead letter stands for it; output is then what the dead letter says.
create or replace function durable.state_of(i_id uuid)
returns table (workflow text, version int, status text, output text, started_at timestamptz, finished_at timestamptz)
language sql stable security definer
set search_path = pg_catalog, durable, pg_temp
as $$
    select s.workflow, s.version, coalesce(f.status, case when d.details is null then 'running' else 'stuck' end),
        coalesce(f.output, d.details), s.at, f.at
    from durable.started s
    left join durable.finished f on f.id = s.id and f.day = s.day
    left join lateral (
        select x.details from durable.dead_letter x where x.id = i_id and f.id is null order by x.seq desc limit 1) d on true
    where s.id = i_id and s.day = durable.day_of(i_id)
$$;

-- durable.outcome(id): status and output of a finished workflow; 'stuck' and the details of one with a dead letter; else nothing.
-- What result() polls: two probes of an index. A dead letter counts only where there is no end.
create or replace function durable.outcome(i_id uuid) returns table (status text, output text)
language sql stable security definer
set search_path = pg_catalog, durable, pg_temp
as $$
    (select f.status, f.output from durable.finished f where f.id = i_id and f.day = durable.day_of(i_id))
    union all
    (select 'stuck', d.details from durable.dead_letter d where d.id = i_id order by d.seq desc limit 1)
    limit 1
$$;
