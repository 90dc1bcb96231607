"""``start``: prepare the database, then be the supervisor until told to stop."""

from __future__ import annotations

import os
from collections.abc import Sequence

import msgspec

from durable_cluster import log_output, replay_statements, schedules, schema
from durable_cluster.app import App
from durable_cluster.errors import AppError, NotInstalled
from durable_cluster.examples.orders import northwind
from durable_cluster.loading import load_app
from durable_cluster.ops import install
from durable_cluster.ops.console.beside import console_beside
from durable_cluster.ops.running import registered
from durable_cluster.ops.target import Database, Target
from durable_cluster.ops.terminal import PROGRAM, BadUsage, Terminal
from durable_cluster.settings import Settings, environment
from durable_cluster.shards.messages import ClusterConfig
from durable_cluster.shards.metrics_page import Address, Page, address_of
from durable_cluster.shards.monitoring import monitored
from durable_cluster.shards.process import resident_memory_mib
from durable_cluster.shards.supervisor import Supervisor

EXAMPLES = "durable_cluster.examples.orders.flows:app"


class Up(msgspec.Struct, frozen=True, kw_only=True):
    """What a cluster says once all its processes are up."""

    pid: int
    shards: int
    processes: int
    connections: int
    memory_mib: float
    app: str
    workflows: list[str]
    database: str
    metrics: str | None = None


def start(
    terminal: Terminal,
    target: Target,
    *,
    app_address: str | None,
    shards: int | None,
    consumers_per_shard: int,
    with_roles: bool,
    overrides: Sequence[str],
    log_level: str,
    log_format: str | None,
    metrics: str | None = None,
    console: tuple[str, int] | None = None,
) -> int:
    """Run a cluster here until SIGTERM, SIGINT or ``stop``. ``metrics``: where their page is served, else ``DURABLE_METRICS`` says;
    ``console``: with one at that host and port.
    """
    form = log_output.chosen(log_format)
    log_output.configure(log_level, form)
    page = _page_address(metrics)
    address = EXAMPLES if app_address is None else app_address
    app = loaded(address)
    settings = overridden(app.settings, overrides)
    with registered(target.data), target.opened(app=app, is_made=True) as database:
        layout = prepare(database, shards=shards, with_roles=with_roles, is_example=address == EXAMPLES)
        declare(terminal, app, database, settings)
        config = ClusterConfig(
            dsn=database.dsn,
            app=address,
            shards=layout,
            consumers_per_shard=consumers_per_shard,
            settings=settings,
            log_level=log_level,
            log_format=form,
        )
        supervisor = Supervisor(config, on_up=lambda up: _say_up(terminal, up, app, database, served))
        with (
            monitored(supervisor, page) as served,
            console_beside(terminal, database, console, app_address=address, metrics=_url_of(served)),
        ):
            supervisor.run()
    terminal.note("the cluster has stopped")
    return 0


def _url_of(page: Page | None) -> str | None:
    return None if page is None else f"http://{page.address}/metrics"


def _page_address(said: str | None) -> Address | None:
    if said is not None:
        return address_of(said, source="--metrics ")
    here = environment().metrics
    return None if here is None else address_of(here, source="DURABLE_METRICS=")


def loaded(address: str) -> App:
    """The App at ``address``, if there is anything in it to run. Raises AppError."""
    app = load_app(address)
    if not app.machines:
        raise AppError(f"--app {address}: app '{app.name}' has no workflow; declare one with app.machine(…)")
    return app


def overridden(settings: Settings, words: Sequence[str]) -> Settings:
    """``settings`` with each ``name=value`` of ``words``. Raises BadUsage."""
    given: dict[str, object] = {}
    for word in words:
        name, _, text = word.partition("=")
        if name not in Settings.__struct_fields__:
            known = ", ".join(Settings.__struct_fields__)
            raise BadUsage(f"--set {word}: no setting '{name}'; there are {known}")
        kind = type(getattr(settings, name))
        try:
            given[name] = msgspec.convert(text, kind, strict=False)
        except msgspec.ValidationError as error:
            raise BadUsage(
                f"--set {word}: '{text}' is no {kind.__name__}, such as {getattr(settings, name)}"
            ) from error
        if not 0 < float(str(given[name])) < float("inf"):
            raise BadUsage(f"--set {word}: choose a number above zero")
    return msgspec.structs.replace(settings, **given)


def prepare(database: Database, *, shards: int | None, with_roles: bool, is_example: bool) -> int:
    """A database that a cluster can start on; the number of its shards.

    The local one gets its schema here. In anybody's real database nothing is made silently: that raises NotInstalled.
    """
    with database.connect("start") as connection:
        if database.is_local:
            known = schema.installed_shards(connection)
            schema.install(connection, shards=known or shards or schema.DEFAULT_SHARDS, with_roles=with_roles)
        layout = schema.demand_installed(connection, shards=shards)
        if is_example and database.is_local:
            northwind.prepare(connection)
        elif is_example and not install.has_example_tables(connection):
            raise NotInstalled(
                f"the bundled examples need tables that {database.name} lacks: run 'durable-cluster init --examples' on it,"
                " or name your own app with --app module:app"
            )
        return layout


def declare(terminal: Terminal, app: App, database: Database, settings: Settings) -> None:
    """Say which workflows there are, make the schedules what the app's code says, and tell of those that it no longer names."""
    with database.connect("start") as connection:
        replay_statements.declare_types(connection, app.declared_types(settings))
        for name in schedules.declare(app, connection):
            terminal.note(
                f"schedule '{name}' is no longer in the code of app '{app.name}' and goes on firing;"
                f" end it with '{PROGRAM} schedules delete {name}'"
            )


def _say_up(terminal: Terminal, supervisor: Supervisor, app: App, database: Database, page: Page | None) -> None:
    children = list(supervisor.pids.values())
    up = Up(
        pid=os.getpid(),
        shards=supervisor.config.shards,
        processes=len(children) + 1,
        connections=len(children) + 1,  # one each, and no pool
        memory_mib=round(resident_memory_mib([os.getpid(), *children]), 1),
        app=supervisor.config.app,
        workflows=list(app.machines),
        database=database.name,
        metrics=_url_of(page),
    )
    shards = "1 shard" if up.shards == 1 else f"{up.shards} shards"
    lines = [
        f"up: {shards}, {up.processes} processes, {up.connections} connections, {up.memory_mib:,.0f} MiB",
        f"  app       {up.app} ({', '.join(up.workflows)})",
        f"  database  {up.database}",
        *([] if up.metrics is None else [f"  metrics   {up.metrics}"]),
        f"  stop      Ctrl-C, or 'durable-cluster stop' (pid {up.pid})",
    ]
    terminal.answer(up, lines)
