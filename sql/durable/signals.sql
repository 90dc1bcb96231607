-- Signals. A sender only appends: the signal is a line of the target's shard, and whoever runs that page delivers it. A delivery and
-- the beginning of a wait exclude each other by a lock on the workflow's stripe, so a signal finds the wait or the wait finds the
-- signal. Deleting the row of the wait is the right to resume: a signal, a timeout and a cancel race for it, and one wins.

-- durable.lock_stripes(ids): the stripes of these workflows until the transaction ends, in one order. 1,024 in all: a lock an id would
-- be as many locks as a page has lines. Locks: before those on rows of waits and joins, after that on the page's window.
create or replace function durable.lock_stripes(i_ids uuid[]) returns void
language sql volatile
set search_path = pg_catalog, durable, pg_temp
as $$
    select count(pg_advisory_xact_lock(1685418593, s.stripe))
    from (select distinct durable.slot_of(i) as stripe from unnest(i_ids) i order by 1) s
$$;

-- durable.checked_label(what, text, max): one line of 1 to so many characters, or null, else DC002.
create or replace function durable.checked_label(i_what text, i_text text, i_max int) returns text
language plpgsql immutable
set search_path = pg_catalog, durable, pg_temp
as $$
begin
    if i_text is not null and (length(i_text) not between 1 and i_max or i_text ~ '[[:cntrl:]]') then
        raise exception 'the % has 1 to % characters and no control characters (this one has %)', i_what, i_max, length(i_text)
            using errcode = 'DC002';
    end if;
    return i_text;
end
$$;

-- durable.is_live(id): whether it was started and has not ended.
create or replace function durable.is_live(i_id uuid) returns boolean
language sql stable
set search_path = pg_catalog, durable, pg_temp
as $$
    select exists (select from durable.started s where s.id = i_id and s.day = durable.day_of(i_id))
        and not exists (select from durable.finished f where f.id = i_id and f.day = durable.day_of(i_id))
$$;

-- durable.token_of(id, seq, secret): the token of a wait: its number, and what only a holder of the secret can make of it.
create or replace function durable.token_of(i_id uuid, i_seq int, i_secret bytea) returns text
language sql immutable
set search_path = pg_catalog, durable, pg_temp
as $$
    select i_seq || '-' || left(encode(sha256(i_secret || sha256(i_secret || convert_to(durable.hex(i_id) || ':' || i_seq, 'UTF8'))), 'hex'), 32)
$$;

-- durable.secret(): what tokens are made with; for worker processes.
create or replace function durable.secret() returns bytea
language sql stable security definer
set search_path = pg_catalog, durable, pg_temp
as $$ select s.secret from durable.secret s $$;

-- durable.seq_of_token(id, token): the number of a token that is this workflow's and was not used, else null.
create or replace function durable.seq_of_token(i_id uuid, i_token text) returns int
language plpgsql stable
set search_path = pg_catalog, durable, pg_temp
as $$
declare
    v_seq int := coalesce(substring(i_token from '^([0-9]{1,9})-[0-9a-f]{32}$'), '0')::int;
    v_is_genuine boolean := durable.token_of(i_id, v_seq, (select s.secret from durable.secret s)) = i_token;
    v_is_used boolean := exists (select from durable.used_token u where u.id = i_id and u.seq = v_seq);
begin
    return case when v_is_genuine and not v_is_used then v_seq end;
end
$$;

-- durable.use_token(id, seq): a token that has worked works no more: other signals that brought it leave the mailbox, or no wait that
-- demands none would be safe from them. Under the workflow's stripe.
create or replace function durable.use_token(i_id uuid, i_seq int) returns void
language sql volatile
set search_path = pg_catalog, durable, pg_temp
as $$
    insert into durable.used_token (id, seq) values (i_id, i_seq) on conflict do nothing;
    delete from durable.mailbox m where m.id = i_id and m.token_seq = i_seq;
$$;

-- durable.send_signal(id, name, payload, key, token, actor): sends a signal, in the caller's transaction, at any isolation level.
--   i_payload  JSON; i_key: of signals with one key the first counts; i_token: of the wait, if that demands one; i_actor: who sends it
-- Result: null, or why it was refused: an id that is unknown or has ended, a token that is wrong or was used, in one way and at one
-- price. A refusal is an answer and no error, so that the audit keeps it if the caller commits.
-- Errors: DC002; 40001 (a snapshot older than a rotation). Tables: the shard's log (one event), audit. It takes no lock.
create or replace function durable.send_signal(i_id uuid, i_name text, i_payload text default 'null', i_key text default null,
    i_token text default null, i_actor text default null) returns text
language plpgsql security definer
set search_path = pg_catalog, durable, pg_temp
as $$
declare
    v_payload text := durable.checked_payload(i_payload);
    v_token_seq int := durable.seq_of_token(i_id, i_token);
    v_max int := (select c.mailbox_max from durable.cluster c);
    v_is_refused boolean := exists (
        select from durable.wait w where w.id = i_id and i_name = any (w.names) and w.token_seq is not null
            and w.token_seq is distinct from v_token_seq);
begin
    perform durable.checked_name('signal', i_name), durable.checked_key(i_key), durable.checked_label('actor', i_actor, 255);
    if not durable.is_live(i_id) or v_is_refused or (i_token is not null and v_token_seq is null) then
        perform durable.record('signal_refused', array[i_id], i_actor, array[jsonb_build_object('signal', i_name)]);
        return format('no workflow takes signal %L with the id %s… and this token: it is unknown, has ended, or the token is wrong or used',
            i_name, durable.short(i_id));
    end if;
    if (select count(*) from (select from durable.mailbox m where m.id = i_id limit v_max) m) = v_max then
        raise exception 'the mailbox of workflow %… holds % signals that it does not wait for; that is the limit',
            durable.short(i_id), v_max using errcode = 'DC002';
    end if;
    perform durable.append(s.shard,
        durable.line(i_id, 1, '@signal', i_name, 0,
            '{"event":{"name":"' || i_name || '","payload":' || v_payload || ',"actor":' || coalesce(to_json(i_actor)::text, 'null')
            || ',"at":' || to_json(durable.now()) || '},"key":' || coalesce(to_json(i_key)::text, 'null')
            || ',"token":' || coalesce(v_token_seq::text, 'null') || '}'), 1)
    from durable.slot s where s.slot = durable.slot_of(i_id);
    perform durable.record('signal', array[i_id], i_actor, array[jsonb_build_object('signal', i_name)]);
    return null;
end
$$;

-- durable.signal(…): as send_signal; a refusal is an error, DC003, which takes its row of the audit with it.
create or replace function durable.signal(i_id uuid, i_name text, i_payload text default 'null', i_key text default null,
    i_token text default null, i_actor text default null) returns void
language plpgsql security definer
set search_path = pg_catalog, durable, pg_temp
as $$
declare
    v_refusal text := durable.send_signal(i_id, i_name, i_payload, i_key, i_token, i_actor);
begin
    if v_refusal is not null then
        raise exception '%', v_refusal using errcode = 'DC003';
    end if;
end
$$;

-- durable.with_event(line, event): a step event that brings a signal along.
create or replace function durable.with_event(i_line text, i_event text) returns text
language sql immutable
as $$ select left(i_line, -1) || ',"e":' || i_event || '}' $$;

-- durable.deliver(ids, names, events, keys, tokens): signals of one page, in its transaction: each resumes the wait for it or goes to the
-- mailbox. One of each a line; no key, no token: nothing. How many were dropped: their workflow has ended, their
-- token was used meanwhile, or the mailbox is full.
-- Tables: wait (a row deleted), mailbox (a row inserted), signal_key, used_token, the shards' logs, audit.
create or replace function durable.deliver(i_ids text, i_names text, i_events text, i_keys text, i_tokens text) returns int
language plpgsql security definer
set search_path = pg_catalog, durable, pg_temp
as $$
declare
    v_signal record;
    v_wait durable.wait;
    v_max int := (select c.mailbox_max from durable.cluster c);
    v_ids uuid[] := '{}';
    v_lines text[] := '{}';
    v_names jsonb[] := '{}';
    v_dropped int := 0;
begin
    perform durable.lock_stripes(array(select i::uuid from string_to_table(i_ids, E'\n') i));
    for v_signal in
        select q.id::uuid as id, q.name, q.event, nullif(q.key, '') as key, nullif(q.token, '')::int as token_seq
        from rows from (string_to_table(i_ids, E'\n'), string_to_table(i_names, E'\n'), string_to_table(i_events, E'\n'),
            string_to_table(i_keys, E'\n'), string_to_table(i_tokens, E'\n')) with ordinality q(id, name, event, key, token, o)
        order by q.id, q.o
    loop
        if not durable.is_live(v_signal.id) then
            v_dropped := v_dropped + 1;
            continue;
        end if;
        -- Two with one token may have been sent before either came here.
        if exists (select from durable.used_token u where u.id = v_signal.id and u.seq = v_signal.token_seq) then
            v_dropped := v_dropped + 1;
            continue;
        end if;
        if v_signal.key is not null then
            insert into durable.signal_key (id, key) values (v_signal.id, v_signal.key) on conflict do nothing;
            continue when not found;
        end if;
        delete from durable.wait w
        where w.id = v_signal.id and v_signal.name = any (w.names) and (w.token_seq is null or w.token_seq = v_signal.token_seq)
        returning * into v_wait;
        if found then
            v_ids := v_ids || v_signal.id;
            v_lines := v_lines || durable.with_event(coalesce(v_wait.signal_line, v_wait.line), v_signal.event);
            v_names := v_names || jsonb_build_object('signal', v_signal.name);
            if v_wait.token_seq is not null then
                perform durable.use_token(v_signal.id, v_wait.token_seq);
            end if;
        elsif (select count(*) from (select from durable.mailbox m where m.id = v_signal.id limit v_max) m) < v_max then
            insert into durable.mailbox (id, name, event, token_seq)
            values (v_signal.id, v_signal.name, v_signal.event, v_signal.token_seq);
        else
            v_dropped := v_dropped + 1;
        end if;
    end loop;
    perform durable.append_lines(v_ids, v_lines);
    perform durable.record('resume', v_ids, null, v_names);
    return v_dropped;
end
$$;

-- durable.take_mail(id, names, token_seq): takes the oldest signal of one of these names out of the mailbox, one that brings this
-- token if there is one; nulls without any. Under the workflow's stripe. Tables: mailbox (a row deleted), used_token.
create or replace function durable.take_mail(i_id uuid, i_names text[], i_token_seq int) returns durable.mailbox
language plpgsql volatile
set search_path = pg_catalog, durable, pg_temp
as $$
declare
    v_mail durable.mailbox;
begin
    delete from durable.mailbox m
    where (m.id, m.number) = (
        select b.id, b.number from durable.mailbox b
        where b.id = i_id and b.name = any (i_names) and (i_token_seq is null or b.token_seq = i_token_seq)
        order by b.number limit 1)
    returning * into v_mail;
    if found and i_token_seq is not null then
        perform durable.use_token(i_id, i_token_seq);
    end if;
    return v_mail;
end
$$;

-- durable.await_signals(ids, seqs, names, lines, timeout_lines, delays, tokens): waits of one page, in its transaction: each takes the
-- oldest signal from the mailbox that it waits for and goes on, or becomes a row. One of each a line.
--   i_names          the signals, with commas; i_lines: the step event that gets the signal
--   i_timeout_lines  the step event when the delay in milliseconds is over; no delay: nothing
--   i_tokens         the number of the token that a signal must bring; none: nothing
--   i_cleanups       what belongs to the cleanup after a cancel: anything; else nothing, and a cancelled workflow does not wait
-- Tables: mailbox (a row deleted), wait (a row inserted), a timer, the shards' logs, audit.
create or replace function durable.await_signals(i_ids text, i_seqs text, i_names text, i_lines text, i_timeout_lines text, i_delays_ms text,
    i_tokens text, i_cleanups text) returns void
language plpgsql security definer
set search_path = pg_catalog, durable, pg_temp
as $$
declare
    v_new record;
    v_mail durable.mailbox;
    v_now timestamptz := durable.timer_now();
    v_ids uuid[] := '{}';
    v_lines text[] := '{}';
    v_resumed uuid[] := '{}';
    v_resumed_by jsonb[] := '{}';
    v_timed_ids uuid[] := '{}';
    v_timed_seqs int[] := '{}';
    v_delays_ms float8[] := '{}';
begin
    perform durable.lock_stripes(array(select i::uuid from string_to_table(i_ids, E'\n') i));
    for v_new in
        select q.id::uuid as id, q.seq::int as seq, string_to_array(q.names, ',') as names, q.line, q.timeout_line,
            nullif(q.delay_ms, '')::float8 as delay_ms, nullif(q.token, '')::int as token_seq, coalesce(q.cleanup, '') as cleanup
        from rows from (string_to_table(i_ids, E'\n'), string_to_table(i_seqs, E'\n'), string_to_table(i_names, E'\n'),
            string_to_table(i_lines, E'\n'), string_to_table(i_timeout_lines, E'\n'), string_to_table(i_delays_ms, E'\n'),
            string_to_table(i_tokens, E'\n'), string_to_table(i_cleanups, E'\n'))
            q(id, seq, names, line, timeout_line, delay_ms, token, cleanup)
        order by q.id
    loop
        if v_new.cleanup = '' and exists (select from durable.cancelled c where c.id = v_new.id) then
            v_ids := v_ids || v_new.id;
            v_lines := v_lines || v_new.line;
            continue;
        end if;
        v_mail := durable.take_mail(v_new.id, v_new.names, v_new.token_seq);
        if v_mail.id is not null then
            v_ids := v_ids || v_new.id;
            v_lines := v_lines || durable.with_event(v_new.line, v_mail.event);
            v_resumed := v_resumed || v_new.id;
            v_resumed_by := v_resumed_by || jsonb_build_object('signal', v_mail.name);
            continue;
        end if;
        insert into durable.wait (id, seq, line, due, since, names, signal_line, token_seq)
        values (v_new.id, v_new.seq, v_new.timeout_line, coalesce(v_now + make_interval(secs => v_new.delay_ms / 1000), 'infinity'),
            durable.now(), v_new.names, nullif(v_new.line, v_new.timeout_line), v_new.token_seq)
        -- The same step twice can only have been put into the log by hand: that must not stop its page.
        on conflict do nothing;
        if v_new.delay_ms is not null then
            v_timed_ids := v_timed_ids || v_new.id;
            v_timed_seqs := v_timed_seqs || v_new.seq;
            v_delays_ms := v_delays_ms || v_new.delay_ms;
        end if;
    end loop;
    perform durable.append_lines(v_ids, v_lines);
    perform durable.record('resume', v_resumed, null, v_resumed_by);
    if v_timed_ids <> '{}' then
        perform durable.set_timers(v_timed_ids, v_timed_seqs, array_fill(null::text, array[cardinality(v_timed_ids)]), v_delays_ms);
    end if;
end
$$;
