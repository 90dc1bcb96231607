-- Grants: everything is denied to everyone, then three roles get what they need.
-- pgque_reader consumes, pgque_writer produces, pgque_admin is both and runs the engine.
-- With durable.no_roles = 'on' (an installer that may not create roles) only the denial is done.
-- A function that is replaced keeps its grants: what an older version allowed these roles is taken back first.

revoke all on schema pgque from public;
revoke all on all tables in schema pgque from public;
revoke all on all sequences in schema pgque from public;
revoke all on all functions in schema pgque from public;

do $$
declare
  v_role text;
  v_function text;
begin
  if current_setting('durable.no_roles', true) = 'on' then
    return;
  end if;
  foreach v_role in array array['pgque_reader', 'pgque_writer', 'pgque_admin'] loop
    if to_regrole(v_role) is null then
      begin
        execute format('create role %I', v_role);
      exception when duplicate_object or unique_violation then
        null;  -- roles are shared by all databases: another installation made it at the same moment
      end;
    end if;
  end loop;
  foreach v_role in array array['pgque_reader', 'pgque_writer'] loop
    if not exists (select from pg_catalog.pg_auth_members m
                    where m.roleid = v_role::regrole and m.member = 'pgque_admin'::regrole) then
      execute format('grant %I to pgque_admin', v_role);
    end if;
  end loop;

  revoke all on schema pgque from pgque_reader, pgque_writer, pgque_admin;
  revoke all on all tables in schema pgque from pgque_reader, pgque_writer, pgque_admin;
  revoke all on all sequences in schema pgque from pgque_reader, pgque_writer, pgque_admin;
  revoke all on all functions in schema pgque from pgque_reader, pgque_writer, pgque_admin;
  grant usage on schema pgque to pgque_reader, pgque_writer, pgque_admin;
  grant select on all tables in schema pgque to pgque_reader;
  grant all on all tables in schema pgque to pgque_admin;
  grant all on all sequences in schema pgque to pgque_admin;
  foreach v_function in array array[
    'version()', 'get_queue_info()', 'get_queue_info(text)', 'get_consumer_info()', 'get_consumer_info(text)',
    'get_consumer_info(text, text)', 'get_batch_info(bigint)', 'get_batch_events(bigint)', 'finish_batch(bigint)',
    'register_consumer(text, text)', 'unregister_consumer(text, text)', 'next_batch(text, text)', 'next_batch_info(text, text)',
    'next_batch_custom(text, text, interval, int, interval)', 'register_subconsumer(text, text, text, boolean)',
    'unregister_subconsumer(text, text, text, int)', 'touch_subconsumer(text, text, text)', 'next_batch(text, text, text, interval)',
    'next_batch_custom(text, text, text, interval, int, interval, interval)', 'event_tables(int, pg_snapshot)'] loop
    execute format('grant execute on function pgque.%s to pgque_reader', v_function);
  end loop;
  grant execute on function pgque.insert_event(text, text, text),
    pgque.insert_event(text, text, text, text, text, text, text) to pgque_writer;
  grant execute on all functions in schema pgque to pgque_admin;
end $$;
