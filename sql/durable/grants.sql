-- Default deny. Roles are made by init unless it is told not to; without them only the owner of the schema can use it.
revoke all on schema durable from public;
revoke all on all tables in schema durable from public;
revoke execute on all functions in schema durable from public;
