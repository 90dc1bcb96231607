-- Default deny, then four roles; the owner is whoever installed.
--   durable_client    starts workflows and reads the outcome of those whose ids it holds
--   durable_worker    runs a cluster's processes: everything but the layout
--   durable_operator  sees where workflows stand, sets the windows of dead processes free, makes and changes schedules; reads no payloads
--   durable_viewer    sees lists and totals, ids truncated
-- With durable.no_roles = 'on' (an installer that may not create roles) only the denial is done.
-- A function that is replaced keeps its grants: what an older version allowed these roles is taken back first.
revoke all on schema durable from public;
revoke all on all tables in schema durable from public;
revoke all on all sequences in schema durable from public;
revoke all on all functions in schema durable from public;

do $$
declare
    v_roles constant text[] := array['durable_client', 'durable_worker', 'durable_operator', 'durable_viewer'];
    v_role text;
begin
    if current_setting('durable.no_roles', true) = 'on' then
        return;
    end if;
    foreach v_role in array v_roles loop
        if to_regrole(v_role) is null then
            begin
                execute format('create role %I', v_role);
            exception when duplicate_object or unique_violation then
                null;  -- roles are shared by all databases: another installation made it at the same moment
            end;
        end if;
    end loop;

    revoke all on schema durable from durable_client, durable_worker, durable_operator, durable_viewer;
    revoke all on all tables in schema durable from durable_client, durable_worker, durable_operator, durable_viewer;
    revoke all on all sequences in schema durable from durable_client, durable_worker, durable_operator, durable_viewer;
    revoke all on all functions in schema durable from durable_client, durable_worker, durable_operator, durable_viewer;

    foreach v_role in array v_roles loop
        execute format('grant usage on schema durable to %I', v_role);
        execute format('grant select on durable.cluster, durable.migration, durable.functions to %I', v_role);
        execute format('grant execute on function durable.hex(uuid), durable.short(uuid) to %I', v_role);
    end loop;

    grant execute on function durable.start(text, int, text, text, text, interval, text, text),
        durable.start_by_name(text, text, text, interval, text),
        durable.start_many(text, int, text, text, text, interval, text, text), durable.now(), durable.find(text, text), durable.state_of(uuid), durable.outcome(uuid),
        durable.signal(uuid, text, text, text, text, text), durable.send_signal(uuid, text, text, text, text, text),
        durable.set_attributes(uuid, text, text), durable.attributes_of(uuid), durable.progress_of(uuid), durable.cancel(uuid, text, text, boolean),
        durable.children_of(text, int, int), durable.group_of(uuid), durable.set_priority(text, float8), durable.history(uuid, int),
        durable.timeline_of(uuid), durable.timeline_head(uuid) to durable_client;

    grant execute on all functions in schema durable to durable_worker;
    revoke execute on function durable.lay_out(int), durable.set_audit(boolean, text) from durable_worker;

    grant execute on function durable.list(text, text, int, text, text, timestamptz, timestamptz, text, text, text),
        durable.list_total(text, text, text, timestamptz, timestamptz, text, text, text), durable.totals(), durable.shard_status(), durable.asides(),
        durable.row_changes(), durable.figures(), durable.shard_figures(), durable.pauses(), durable.limits(), durable.audit_list(text, text, text, timestamptz, int),
        durable.audit_page(timestamptz, timestamptz, int, bigint, int), durable.is_audited(), durable.audit_reaches_back()
        to durable_viewer, durable_operator;
    grant execute on function durable.waiting(text, text, text, int, text), durable.waiting_types(), durable.due_next(text, int, text),
        durable.processes(), durable.slow_steps(int), durable.log_sample(int), durable.log_entries(), durable.kept_sample() to durable_viewer, durable_operator;
    grant execute on function durable.dead_letters(text, text, text, int, timestamptz), durable.dead_letter_total(text, text, text, bigint)
        to durable_viewer, durable_operator;
    -- No payloads. A viewer, who sees 12 digits of an id, asks by these.
    grant execute on function durable.timeline_of(uuid), durable.timeline_head(uuid), durable.timeline_by_digits(text),
        durable.timeline_head_by_digits(text), durable.history_lag(), durable.timeline_skips(int) to durable_viewer, durable_operator;
    -- All of a dead letter but its state, which is a payload: durable.dead_letter_state is not among them.
    grant execute on function durable.dead_letter_of(uuid), durable.dead_letters_by_prefix(text),
        durable.retry_dead_letter(uuid, text, int), durable.retry_dead_letters(text, text, text, int, timestamptz),
        durable.purge_dead_letter(uuid), durable.purge_dead_letters(text, text, text, int, timestamptz) to durable_operator;
    grant execute on function durable.log(int), durable.locate(uuid), durable.by_prefix(text), durable.abandon(bigint, int), durable.cancel(uuid, text, text, boolean),
        durable.group_of(uuid), durable.pause(text, text, text), durable.resume(text, text, text),
        durable.set_priority(text, float8), durable.set_limit(text, int, int, interval), durable.reset_limit(text) to durable_operator;

    -- Of a memo the paths; the values are payloads: durable.history is not among them.
    grant execute on function durable.paths(uuid, int), durable.replay(uuid, text), durable.fork(uuid, text, text, text),
        durable.replay_many(text, text, int, text, text, timestamptz, timestamptz, text, text, text, text),
        durable.fork_many(text, text, text, text, int, text, text, timestamptz, timestamptz, text, text, text, text) to durable_operator;

    -- Of a workflow all but its input, which is a payload: durable.input_of is not among them.
    grant execute on function durable.pulse(pg_snapshot), durable.recent_ends(int), durable.known(uuid),
        durable.family(uuid, int, int) to durable_viewer, durable_operator;

    grant execute on function durable.schedules(text), durable.runs_of(text, timestamptz[]), durable.overdue(), durable.now()
        to durable_viewer, durable_operator;
    -- All of a schedule but its input, which is a payload: durable.schedule_input is not among them.
    grant execute on function durable.put_schedule(text, text, text, timestamptz, text, int, text, text, text, text, int, float8, text),
        durable.change_schedule(text, text, text, timestamptz, text, int, text, text, text, text, int, float8),
        durable.pause_schedule(text, text), durable.resume_schedule(text), durable.delete_schedule(text),
        durable.trigger_schedule(text, text), durable.backfill_schedule(text, int, timestamptz[]) to durable_operator;
end
$$;
