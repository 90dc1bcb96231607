"""The command line: which commands and options there are. Nothing is decided here but what a word may be."""

from __future__ import annotations

import argparse
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn, TypeAlias

from durable_cluster.ops.assets import add_options as add_assets
from durable_cluster.ops.bench import add_options as add_bench
from durable_cluster.ops.console import command as console
from durable_cluster.ops.letters import REASONS
from durable_cluster.ops.terminal import PROGRAM, BadUsage
from durable_cluster.ops.values import actor, attribute, between, moment, seconds
from durable_cluster.replays import HISTORY_MAX
from durable_cluster.search import LIMIT_MAX, STATUSES
from durable_cluster.settings import LOG_FORMATS, METRICS, SHARDS_MAX

COUNT_MAX = 10_000_000
CONSUMERS_MAX = 16
LOG_LEVELS = ("debug", "info", "warning", "error")
ABOUT = "Durable, crash-proof workflows on the Postgres you already run."
OVERLAP = "while a run lives the next one is left out (skip), waits (queue) or starts (allow)"
ORDER = "The database: --dsn, else what the app says, else DURABLE_DSN, else a local Postgres under --data."


class Parser(argparse.ArgumentParser):
    """A parser whose errors go the way of all others."""

    def error(self, message: str) -> NoReturn:
        raise BadUsage(f"{message}; see '{self.prog} --help'")


Commands: TypeAlias = "argparse._SubParsersAction[Parser]"


def parser() -> Parser:
    """Every command and option."""
    top = Parser(prog=PROGRAM, description=ABOUT, epilog=ORDER, allow_abbrev=False)
    top.add_argument("--version", action="version", version=f"{PROGRAM} {version('durable-cluster')}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=Parser)

    def command(name: str, help_: str) -> Parser:
        return _add_command(commands, name, help_)

    _add_start(command("start", "run a cluster here"))

    init = command("init", "install the schema into a database, or upgrade it")
    _add_shards(init)
    _add_no_roles(init)
    init.add_argument("--examples", action="store_true", help="also make the tables of the bundled examples")

    uninstall = command("uninstall", "remove the schema, with every workflow in it")
    uninstall.add_argument("--yes", action="store_true", help="do not ask")

    _add_run(command("run", "start workflows and print their ids"))

    _add_signal(command("signal", "send a signal to a workflow that waits for it, or will"))

    _add_cancel(command("cancel", "ask a workflow to end; its cleanup runs in place of its next step"))

    _add_pause(command("pause", "let no step of a workflow, of all of a type, or of a shard begin"))
    _add_pause(command("resume", "let go on what was paused"))

    _add_priority(command("priority", "give a workflow a larger or smaller share of the turns"))

    command("status", "show the cluster, shard by shard")

    _add_list(command("list", "list workflows, newest first"))

    show = command("show", "show one workflow")
    _add_id(show)
    _add_reader(show)

    _add_history(command("history", "show the awaits that a linear workflow has recorded"))
    _add_id(command("timeline", "show when each step of a workflow ran, as far as that is recorded"))

    _add_again(
        command("replay", "start workflows over, with the same input: a stuck one itself, of an ended one a new one")
    )
    _add_fork(command("fork", "start a new workflow from a point of another, with what was recorded before it"))

    _add_dead_letters(commands)
    _add_limits(commands)
    _add_schedules(commands)
    _add_audit(commands)

    stop = command("stop", "stop the cluster that runs from --data")
    stop.add_argument("--now", action="store_true", help="do not let running steps end")
    stop.add_argument("--timeout", type=seconds, default=60.0, metavar="S", help="wait at most so long (60)")

    console.add_options(command("console", "serve the console, a web page and a REST API, from here"))

    command("doctor", "check everything that has to be right")
    add_assets(command("assets", "write out dashboards, alert rules, runbooks and deployment files"))
    command("psql", "open psql on the database; what follows goes to psql")

    _add_demo(command("demo", "take 830 real orders through a cluster and reconcile the books"))
    add_bench(command("bench", "measure the hot path beside its peers and write a report"))
    return top


def _add_command(commands: Commands, name: str, help_: str) -> Parser:
    made = commands.add_parser(name, help=help_, description=f"{help_}.", epilog=ORDER, allow_abbrev=False)
    made.add_argument("--dsn", help="a Postgres to use, such as postgresql://user@host/database")
    made.add_argument("--data", type=Path, metavar="DIR", help="directory of the local Postgres (./.durable)")
    made.add_argument("--json", action="store_true", help="answer with one JSON document")
    return made


def _add_id(to: Parser) -> None:
    to.add_argument("id", metavar="ID", help="an id, or the first digits of one")


def _add_priority(priority: Parser) -> None:
    _add_id(priority)
    priority.add_argument("weight", type=float, metavar="WEIGHT", help="0.1 to 10; 1 is usual")


def _add_history(history: Parser) -> None:
    _add_id(history)
    history.add_argument("--limit", type=between(1, LIMIT_MAX), default=HISTORY_MAX, metavar="N")


def _add_start(start: Parser) -> None:
    _add_shards(start)
    _add_app(start)
    _add_no_roles(start)
    _add_log_level(start)
    start.add_argument(
        "--log-format", choices=LOG_FORMATS, help="(DURABLE_LOG_FORMAT, else pretty on a terminal, plain elsewhere)"
    )
    start.add_argument("--consumers-per-shard", type=between(1, CONSUMERS_MAX), default=1, metavar="N")
    start.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="a setting, such as drain_grace_s=10"
    )
    console.add_start_option(start)
    start.add_argument(
        "--metrics",
        nargs="?",
        const=METRICS,
        metavar="[HOST:]PORT",
        help=f"serve the metrics page ({METRICS}; extra 'metrics')",
    )
    start.add_argument(
        "--reload", action="store_true", help="drain and start again when Python files change (extra 'reload')"
    )
    start.add_argument(
        "--reload-dir",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="below which (where the app is); may be repeated",
    )


def _add_run(run: Parser) -> None:
    run.add_argument("workflow", metavar="WORKFLOW")
    run.add_argument(
        "--input", default="null", metavar="JSON|@FILE", help="the input (default null; @- is standard input)"
    )
    run.add_argument("--count", type=between(1, COUNT_MAX), default=1, metavar="N", help="start so many")
    run.add_argument("--key", help="the same key gives the same workflow")
    _add_attributes(run, "what 'list' finds it by; may be repeated")
    run.add_argument("--wait", action="store_true", help="wait for the end and print the result")
    run.add_argument("--timeout", type=seconds, metavar="S", help="wait at most so many seconds (implies --wait)")
    _add_app(run)


def _add_cancel(cancel: Parser) -> None:
    _add_id(cancel)
    cancel.add_argument("--reason", default="cancelled", help="why, for whoever asks later")
    cancel.add_argument("--actor", metavar="WHO", help="who cancels")
    cancel.add_argument("--no-cascade", dest="cascade", action="store_false", help="leave its children alone")


def _add_pause(pause: Parser) -> None:
    pause.add_argument("id", nargs="?", metavar="ID", help="one workflow: an id, or the first digits of one")
    pause.add_argument("--workflow", metavar="NAME", help="all workflows of this type")
    pause.add_argument("--shard", type=between(0, SHARDS_MAX - 1), metavar="N", help="all that is read from this shard")
    pause.add_argument("--actor", metavar="WHO", help="who does it")


def _add_signal(signal: Parser) -> None:
    signal.add_argument("id", metavar="ID", help="the whole id, as 'run' printed it")
    signal.add_argument("name", metavar="NAME", help="what the workflow waits for")
    signal.add_argument(
        "--payload",
        default="null",
        metavar="JSON|@FILE",
        help="what comes with it (default null; @- is standard input)",
    )
    signal.add_argument("--key", help="of signals with the same key the first counts")
    signal.add_argument("--token", help="the token of the wait, if it demands one")
    signal.add_argument("--actor", metavar="WHO", help="who sends it")
    signal.add_argument("--app", metavar="MODULE:APP", help="code the payload with the codec of this App")


def _add_demo(demo: Parser) -> None:
    demo.add_argument("--times", type=between(1, 10_000), default=1, metavar="N", help="so many copies of every order")
    demo.add_argument(
        "--chaos", action="store_true", help="kill consumers at work, stop others, kill the local Postgres twice"
    )
    demo.add_argument(
        "--linear", action="store_true", help="the orders' flow as a function, in place of a state machine"
    )
    _add_shards(demo)
    _add_log_level(demo, default="error")


def _add_which(to: Parser) -> None:
    to.add_argument("--workflow", metavar="NAME")
    to.add_argument("--status", choices=STATUSES)
    _add_attributes(to, "those that have it; may be repeated")
    to.add_argument("--from", dest="started_from", type=moment, metavar="TIME", help="started then or later")
    to.add_argument("--to", dest="started_to", type=moment, metavar="TIME", help="started earlier")
    to.add_argument("--parent", metavar="ID", help="the children of that workflow: an id, or its first digits")
    to.add_argument("--key", help="started with it")
    to.add_argument("--origin", metavar="ID", help="replayed or forked from that workflow: an id, or its first digits")


def _add_again(to: Parser) -> None:
    to.add_argument("id", metavar="ID", nargs="?", help="one workflow: an id, or the first digits of one")
    to.add_argument("--all", action="store_true", help="all that match, after a look at them")
    _add_which(to)
    to.add_argument("--yes", action="store_true", help="do not ask")
    to.add_argument("--actor", type=actor, metavar="WHO", help="who does it, for the audit")


def _add_fork(fork: Parser) -> None:
    _add_again(fork)
    at = "a path of 'history', or its position; of a machine a step (default: from the beginning)"
    fork.add_argument("--at", metavar="PATH", help=at)
    fork.add_argument("--input", metavar="JSON|@FILE", help="in place of its own (@- is standard input)")
    fork.add_argument("--app", metavar="MODULE:APP", help="check the input against the code of this App")


def _add_list(list_: Parser) -> None:
    _add_which(list_)
    list_.add_argument("--limit", type=between(1, LIMIT_MAX), default=50, metavar="N")
    list_.add_argument("--after", metavar="CURSOR", help="go on after the list that ended with it")


def _add_audit(commands: Commands) -> None:
    about = "record who does what to workflows, and read the record"
    group = commands.add_parser("audit", help=about, description=f"{about}.", epilog=ORDER, allow_abbrev=False)
    actions = group.add_subparsers(dest="action", metavar="ACTION", required=True, parser_class=Parser)
    for name, help_ in (("on", "begin the record"), ("off", "end it; what there is stays")):
        switch = _add_command(actions, name, help_)
        switch.add_argument("--actor", metavar="WHO", help="who says so")
    list_ = _add_command(actions, "list", "show it, newest first")
    list_.add_argument("--id", metavar="ID", help="of one workflow: its id, or the first digits")
    list_.add_argument("--actor", metavar="WHO")
    list_.add_argument("--what", metavar="WHAT", help="start, signal, signal_refused, resume, timeout, cancel, …")
    list_.add_argument("--since", type=moment, metavar="TIME")
    list_.add_argument("--limit", type=between(1, LIMIT_MAX), default=50, metavar="N")
    export = _add_command(actions, "export", "write it out, oldest first, before retention drops it")
    export.add_argument("--since", type=moment, metavar="TIME", help="from then on")
    export.add_argument("--before", type=moment, metavar="TIME", help="up to then")
    export.add_argument("--format", choices=("jsonl",), default="jsonl", help="one JSON object a line (jsonl)")
    export.add_argument("--out", type=Path, metavar="FILE", help="where to (else standard output)")


def _add_attributes(to: Parser, help_: str) -> None:
    to.add_argument("--attribute", action="append", type=attribute, default=[], metavar="NAME=VALUE", help=help_)


def _add_limits(commands: Commands) -> None:
    about = "look at what limits how many steps run, and change it at once"
    group = commands.add_parser("limits", help=about, description=f"{about}.", epilog=ORDER, allow_abbrev=False)
    actions = group.add_subparsers(dest="action", metavar="ACTION", required=True, parser_class=Parser)

    _add_command(actions, "list", "list the limits, with what holds and what waits")

    set_ = _add_command(actions, "set", "let these numbers count in place of those that the code declares")
    set_.add_argument("name", metavar="NAME")
    set_.add_argument("--concurrency", type=between(0, 1_000_000), metavar="N", help="at most so many at once")
    set_.add_argument("--rate", metavar="N/PERIOD", help="at most so many a period, such as 100/1s or 5/1m")

    reset = _add_command(actions, "reset", "let the numbers count again that the code declares")
    reset.add_argument("name", metavar="NAME")


def _add_dead_letters(commands: Commands) -> None:
    about = "look at the steps that cannot go on, take them up again, or end their workflows"
    group = commands.add_parser("dead-letters", help=about, description=f"{about}.", epilog=ORDER, allow_abbrev=False)
    actions = group.add_subparsers(dest="action", metavar="ACTION", required=True, parser_class=Parser)

    list_ = _add_command(actions, "list", "list dead letters, newest first")
    _add_letter_filter(list_)
    list_.add_argument("--limit", type=between(1, LIMIT_MAX), default=50, metavar="N")

    show = _add_command(actions, "show", "show one, with its state")
    show.add_argument("id", metavar="ID", help="the workflow's id, or the first digits of it")
    _add_reader(show)

    retry = _add_command(actions, "retry", "take stuck workflows up again where they stopped")
    _add_which_letters(retry)
    retry.add_argument(
        "--state",
        metavar="JSON|@FILE",
        help="an edited state in place of the one it stopped with (@- is standard input)",
    )
    retry.add_argument(
        "--app",
        metavar="MODULE:APP",
        help="check the edited state against the step of this App, and code it with its codec",
    )

    purge = _add_command(actions, "purge", "end stuck workflows for good, as failed")
    _add_which_letters(purge)


def _add_schedules(commands: Commands) -> None:
    about = "look at what starts by itself, make, pause and end it, or run it now"
    group = commands.add_parser("schedules", help=about, description=f"{about}.", epilog=ORDER, allow_abbrev=False)
    actions = group.add_subparsers(dest="action", metavar="ACTION", required=True, parser_class=Parser)

    def action(name: str, help_: str) -> Parser:
        made = _add_command(actions, name, help_)
        if name != "list":
            made.add_argument("name", metavar="NAME")
        return made

    action("list", "list schedules")
    _add_reader(action("show", "show one, with its next due times"))
    create = action("create", "make one")
    create.add_argument("cron", metavar="CRON", help="five fields, as in '0 3 * * *', or @daily")
    create.add_argument("workflow", metavar="WORKFLOW")
    create.add_argument(
        "--input", default="null", metavar="JSON|@FILE", help="the input (default null; @- is standard input)"
    )
    create.add_argument("--due-as", metavar="FIELD", help="the field of the input that gets the due time")
    create.add_argument("--zone", default="UTC", metavar="ZONE", help="such as Europe/Berlin (UTC)")
    create.add_argument("--overlap", default="skip", metavar="POLICY", help=OVERLAP)
    create.add_argument(
        "--catch-up",
        default="1",
        metavar="N|WHILE",
        help="missed due times that still fire: the newest N, or of 1h (1)",
    )
    _add_app(create)
    pause = action("pause", "from now on start nothing")
    pause.add_argument("--reason", help="why, for whoever asks later")
    action("resume", "go on with the next due time")
    action("delete", "end it; what it has started goes on").add_argument(
        "--yes", action="store_true", help="do not ask"
    )
    backfill = action("backfill", "start what was due in a period that is over and was not started")
    backfill.add_argument("begin", metavar="FROM", help="a time such as 2026-03-01T00:00:00+01:00; without offset: UTC")
    backfill.add_argument("end", metavar="TO")
    trigger = action("trigger", "run it now")
    trigger.add_argument("--overlap", metavar="POLICY", help=f"in place of its own: {OVERLAP}")


def _add_which_letters(to: Parser) -> None:
    to.add_argument("id", metavar="ID", nargs="?", help="one workflow, by its id or the first digits of it")
    to.add_argument("--all", action="store_true", help="all that match, after a look at them")
    _add_letter_filter(to)
    to.add_argument("--yes", action="store_true", help="do not ask")
    to.add_argument("--actor", type=actor, metavar="WHO", help="who does it, for the audit")


def _add_letter_filter(to: Parser) -> None:
    to.add_argument("--workflow", metavar="NAME")
    to.add_argument("--step", metavar="NAME")
    to.add_argument("--reason", choices=REASONS)


def _add_shards(to: Parser) -> None:
    to.add_argument("--shards", type=between(1, SHARDS_MAX), metavar="N", help="1 to 64 (8 in a new database)")


def _add_app(to: Parser) -> None:
    to.add_argument("--app", metavar="MODULE:APP", help="where your App is (default: the bundled examples)")


def _add_reader(to: Parser) -> None:
    to.add_argument("--app", metavar="MODULE:APP", help="read what is coded with the codec of this App")


def _add_no_roles(to: Parser) -> None:
    to.add_argument("--no-roles", action="store_true", help="make no database roles")


def _add_log_level(to: Parser, *, default: str = "warning") -> None:
    to.add_argument("--log-level", choices=LOG_LEVELS, default=default, help=f"({default})")
