"""The command ``durable-cluster``: parse, dispatch, and the one place that prints errors.

Exit codes: 0 done, 1 failed, 2 the command line is wrong, 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence

import psycopg
from psycopg.errors import InsufficientPrivilege

from durable_cluster.errors import DurableError
from durable_cluster.ops import (
    assets,
    audit,
    bench,
    cancel,
    dead_letters,
    demo_cluster,
    doctor,
    install,
    limits,
    pause,
    priority,
    psql,
    reload,
    replay,
    run,
    running,
    schedules,
    show,
    signal,
    start,
    status,
    timeline,
)
from durable_cluster.ops.arguments import parser
from durable_cluster.ops.console import command as console
from durable_cluster.ops.letters import Filter
from durable_cluster.ops.target import Target
from durable_cluster.ops.terminal import PROGRAM, BadUsage, Terminal
from durable_cluster.search import Which

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130

Command = Callable[[Terminal, Target, argparse.Namespace], int]


def main(words: Sequence[str] | None = None) -> int:
    """Run one command; the exit code."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # a terminal that knows no …
    try:
        return _dispatch(sys.argv[1:] if words is None else words)
    except BrokenPipeError:
        # Whoever read our output has had enough. What is still buffered must not fail at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except BadUsage as error:
        return _failed(str(error), EXIT_USAGE)
    except DurableError as error:
        return _failed(str(error), EXIT_FAILED)
    except psycopg.Error as error:
        return _failed(_refusal(error), EXIT_FAILED)
    except KeyboardInterrupt:
        print(f"\n{PROGRAM}: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED


def _dispatch(words: Sequence[str]) -> int:
    options, rest = parser().parse_known_args(words)
    if options.command == "psql":
        return psql.psql(Target(options.dsn, options.data), rest[rest[:1] == ["--"] :])
    if rest:
        raise BadUsage(f"unrecognized arguments: {' '.join(rest)}; see '{PROGRAM} {options.command} --help'")
    options.words = words
    code = COMMANDS[options.command](Terminal(is_json=options.json), Target(options.dsn, options.data), options)
    sys.stdout.flush()
    return code


def _refusal(error: psycopg.Error) -> str:
    said = error.diag.message_primary or str(error).strip()
    if isinstance(error, InsufficientPrivilege):
        return f"this role may not: {said}; connect as one that may"
    return f"the database refused: {said}"


def _failed(text: str, code: int) -> int:
    Terminal().error(text)
    return code


def _signal(terminal: Terminal, target: Target, options: argparse.Namespace) -> int:
    return signal.signal(
        terminal,
        target,
        workflow_id=options.id,
        name=options.name,
        text=options.payload,
        key=options.key,
        token=options.token,
        actor=options.actor,
        app_address=options.app,
    )


def _start(terminal: Terminal, target: Target, options: argparse.Namespace) -> int:
    if options.reload or options.reload_dir:
        return reload.start(
            terminal,
            target,
            words=options.words,
            app_address=options.app or start.EXAMPLES,
            directories=options.reload_dir,
        )
    return start.start(
        terminal,
        target,
        app_address=options.app,
        shards=options.shards,
        consumers_per_shard=options.consumers_per_shard,
        with_roles=not options.no_roles,
        overrides=options.set,
        log_level=options.log_level.upper(),
        log_format=options.log_format,
        metrics=options.metrics,
        console=options.console,
    )


def _init(terminal: Terminal, target: Target, options: argparse.Namespace) -> int:
    return install.init(
        terminal, target, shards=options.shards, with_roles=not options.no_roles, with_examples=options.examples
    )


def _uninstall(terminal: Terminal, target: Target, options: argparse.Namespace) -> int:
    return install.uninstall(terminal, target, is_agreed=options.yes)


def _run(terminal: Terminal, target: Target, options: argparse.Namespace) -> int:
    return run.run(
        terminal,
        target,
        workflow=options.workflow,
        text=options.input,
        count=options.count,
        key=options.key,
        attributes=dict(options.attribute) or None,
        app_address=options.app,
        is_waiting=options.wait or options.timeout is not None,
        timeout_s=options.timeout,
    )


def _which(options: argparse.Namespace) -> Which:
    return Which(
        workflow=options.workflow,
        status=options.status,
        attributes=dict(options.attribute) or None,
        started_from=options.started_from,
        started_to=options.started_to,
        parent=options.parent,
        key=options.key,
        origin=options.origin,
    )


def _list(terminal: Terminal, target: Target, options: argparse.Namespace) -> int:
    return show.list_(terminal, target, which=_which(options), limit=options.limit, after=options.after)


def _replay(terminal: Terminal, target: Target, options: argparse.Namespace) -> int:
    which = _which(options)
    replay.checked_choice(options.id, options.all, which, needed=("status",))
    if options.all:
        return replay.replay_all(terminal, target, which=which, is_agreed=options.yes, actor=options.actor)
    return replay.replay(terminal, target, prefix=options.id, actor=options.actor)


def _fork(terminal: Terminal, target: Target, options: argparse.Namespace) -> int:
    which, point = _which(options), replay.point_of(options.at, options.input, options.app)
    replay.checked_choice(options.id, options.all, which, needed=("workflow", "status"))
    if options.all:
        return replay.fork_all(terminal, target, which=which, point=point, is_agreed=options.yes, actor=options.actor)
    return replay.fork(terminal, target, prefix=options.id, point=point, actor=options.actor)


def _audit(terminal: Terminal, target: Target, options: argparse.Namespace) -> int:
    return AUDIT[options.action](terminal, target, options)


def _audit_list(terminal: Terminal, target: Target, options: argparse.Namespace) -> int:
    return audit.list_(
        terminal,
        target,
        prefix=options.id,
        actor=options.actor,
        what=options.what,
        since=options.since,
        limit=options.limit,
    )


def _audit_export(terminal: Terminal, target: Target, options: argparse.Namespace) -> int:
    return audit.export(terminal, target, since=options.since, before=options.before, out=options.out)


def _dead_letters(terminal: Terminal, target: Target, options: argparse.Namespace) -> int:
    return DEAD_LETTERS[options.action](terminal, target, options)


def _dead_letters_list(terminal: Terminal, target: Target, options: argparse.Namespace) -> int:
    return dead_letters.list_(terminal, target, which=_which_letters(options), limit=options.limit)


def _dead_letters_retry(terminal: Terminal, target: Target, options: argparse.Namespace) -> int:
    which = _which_letters(options)
    dead_letters.checked_choice(options.id, options.all, which, state=options.state, app_address=options.app)
    if options.all:
        return dead_letters.retry_all(terminal, target, which=which, is_agreed=options.yes, actor=options.actor)
    return dead_letters.retry(
        terminal, target, prefix=options.id, state=options.state, app_address=options.app, actor=options.actor
    )


def _dead_letters_purge(terminal: Terminal, target: Target, options: argparse.Namespace) -> int:
    which = _which_letters(options)
    dead_letters.checked_choice(options.id, options.all, which)
    if options.all:
        return dead_letters.purge_all(terminal, target, which=which, is_agreed=options.yes, actor=options.actor)
    return dead_letters.purge(terminal, target, prefix=options.id, actor=options.actor)


def _which_letters(options: argparse.Namespace) -> Filter:
    return Filter(workflow=options.workflow, step=options.step, reason=options.reason)


def _schedules(terminal: Terminal, target: Target, options: argparse.Namespace) -> int:
    return SCHEDULES[options.action](terminal, target, options)


def _schedules_create(terminal: Terminal, target: Target, options: argparse.Namespace) -> int:
    return schedules.create(
        terminal,
        target,
        name=options.name,
        cron=options.cron,
        workflow=options.workflow,
        text=options.input,
        zone=options.zone,
        overlap=options.overlap,
        catch_up=options.catch_up,
        due_as=options.due_as,
        app_address=options.app,
    )


def _schedules_backfill(terminal: Terminal, target: Target, options: argparse.Namespace) -> int:
    return schedules.backfill(terminal, target, name=options.name, begin=options.begin, end=options.end)


def _stop(terminal: Terminal, target: Target, options: argparse.Namespace) -> int:
    return running.stop(terminal, target.data, is_now=options.now, timeout_s=options.timeout)


def _demo(terminal: Terminal, target: Target, options: argparse.Namespace) -> int:
    return demo_cluster.demo(
        terminal,
        target,
        times=options.times,
        is_chaotic=options.chaos,
        is_linear=options.linear,
        shards=options.shards,
        log_level=options.log_level.upper(),
    )


COMMANDS: Mapping[str, Command] = {
    "start": _start,
    "init": _init,
    "uninstall": _uninstall,
    "run": _run,
    "signal": _signal,
    "cancel": lambda terminal, target, options: cancel.cancel(
        terminal, target, prefix=options.id, reason=options.reason, actor=options.actor, cascade=options.cascade
    ),
    "pause": pause.pause,
    "resume": pause.resume,
    "priority": lambda terminal, target, options: priority.priority(
        terminal, target, prefix=options.id, weight=options.weight
    ),
    "status": lambda terminal, target, options: status.status(terminal, target),
    "list": _list,
    "show": lambda terminal, target, options: show.show(terminal, target, prefix=options.id, app_address=options.app),
    "history": lambda terminal, target, options: replay.history(
        terminal, target, prefix=options.id, limit=options.limit
    ),
    "timeline": lambda terminal, target, options: timeline.timeline(terminal, target, prefix=options.id),
    "replay": _replay,
    "fork": _fork,
    "dead-letters": _dead_letters,
    "limits": limits.limits,
    "schedules": _schedules,
    "audit": _audit,
    "stop": _stop,
    "console": console.console,
    "doctor": lambda terminal, target, options: doctor.doctor(terminal, target),
    "assets": assets.assets,
    "demo": _demo,
    "bench": lambda terminal, target, options: bench.bench(terminal, options),
}

AUDIT: Mapping[str, Command] = {
    "on": lambda terminal, target, options: audit.switch(terminal, target, is_on=True, actor=options.actor),
    "off": lambda terminal, target, options: audit.switch(terminal, target, is_on=False, actor=options.actor),
    "list": _audit_list,
    "export": _audit_export,
}

DEAD_LETTERS: Mapping[str, Command] = {
    "list": _dead_letters_list,
    "show": lambda terminal, target, options: dead_letters.show(
        terminal, target, prefix=options.id, app_address=options.app
    ),
    "retry": _dead_letters_retry,
    "purge": _dead_letters_purge,
}

SCHEDULES: Mapping[str, Command] = {
    "list": lambda terminal, target, options: schedules.list_(terminal, target),
    "show": lambda terminal, target, options: schedules.show(
        terminal, target, name=options.name, app_address=options.app
    ),
    "create": _schedules_create,
    "pause": lambda terminal, target, options: schedules.pause(
        terminal, target, name=options.name, reason=options.reason
    ),
    "resume": lambda terminal, target, options: schedules.resume(terminal, target, name=options.name),
    "delete": lambda terminal, target, options: schedules.delete(
        terminal, target, name=options.name, is_agreed=options.yes
    ),
    "backfill": _schedules_backfill,
    "trigger": lambda terminal, target, options: schedules.trigger(
        terminal, target, name=options.name, overlap=options.overlap
    ),
}


if __name__ == "__main__":
    sys.exit(main())
