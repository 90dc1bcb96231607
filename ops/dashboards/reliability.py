"""The dashboard for the review after it, or once a week: what broke, what was late, and whether anybody would have seen it."""

from __future__ import annotations

from durable_cluster.ops.dashboards.panels import Board, Panel, Query, Row, part_of, stat

HERE = 'job="$job"'
RETRIES = f"durable_retries_total{{{HERE}}}"
STEPS = f"durable_steps_total{{{HERE}}}"

GLANCE = Row(
    "Over the time shown",
    (
        stat(
            title="Attempts that did not fail",
            about="Of all attempts of steps. 99 % and more; the rest was tried again.",
            expr=f"sum(increase({STEPS}[$__range]))"
            f" / (sum(increase({STEPS}[$__range])) + (sum(increase({RETRIES}[$__range])) or vector(0)) > 0) or vector(1)",
            unit="percentunit",
            runbook="DurableManyRetries",
            width=4,
            warns=0.99,
            alarms=0.75,
            decimals=2,
        ),
        stat(
            title="Postgres answered",
            about="Of the times that a supervisor asked. Below 99.9 %: failovers, restarts, or a server at its limits.",
            expr=f"avg(avg_over_time(durable_database_up{{{HERE}}}[$__range]))",
            unit="percentunit",
            runbook="DurableDatabaseDown",
            width=4,
            warns=0.999,
            alarms=0.99,
            decimals=2,
        ),
        stat(
            title="Oldest step waited",
            about="The longest that a step event has waited. Minutes only after a burst of starts, or an outage.",
            expr=f"max(max_over_time(durable_lag_seconds{{{HERE}}}[$__range]))",
            unit="s",
            runbook="DurableStepsWait",
            width=4,
            warns=60,
            alarms=300,
        ),
        stat(
            title="Latest timer was late by",
            about="Seconds, when very many were due at once.",
            expr=f"max(max_over_time(durable_timer_lag_seconds{{{HERE}}}[$__range]))",
            unit="s",
            runbook="DurableTimersLate",
            width=4,
            warns=5,
            alarms=60,
        ),
        stat(
            title="Dead letters",
            about="Steps that were set aside. Each was a workflow that somebody had to look at.",
            expr=f"sum(increase(durable_dead_letters_total{{{HERE}}}[$__range])) or vector(0)",
            runbook="DurableDeadLetters",
            width=4,
            warns=1,
            decimals=0,
        ),
        stat(
            title="Restarts",
            about="Processes that ended unasked.",
            expr=f"sum(increase(durable_process_restarts_total{{{HERE}}}[$__range])) or vector(0)",
            runbook="DurableRestartLoop",
            width=4,
            warns=3,
            decimals=0,
        ),
    ),
)

STEPS_THAT_FAIL = Row(
    "Steps that fail",
    (
        Panel(
            title="Attempts that failed, by type",
            about="Under 1 %. What is tried again is late, and costs what it calls once more.",
            queries=(
                Query(
                    part_of(RETRIES, STEPS),
                    "{{workflow}}",
                ),
            ),
            unit="percentunit",
            runbook="DurableManyRetries",
            warns=0.25,
        ),
        Panel(
            title="Stuck workflows",
            about="0. A staircase that nobody walks down is a queue that nobody looks at.",
            queries=(Query(f"max(durable_stuck_workflows{{{HERE}}})", "dead letters"),),
            unit="none",
            runbook="DurableDeadLetters",
            warns=1,
        ),
        Panel(
            title="Steps that no code knows",
            about="None; a few during a deployment.",
            queries=(Query(f"sum(rate(durable_unroutable_total{{{HERE}}}[$__rate_interval]))", "put off"),),
            unit="ops",
            runbook="DurableUnroutable",
        ),
    ),
)

PROCESSES = Row(
    "Processes that fail",
    (
        Panel(
            title="Restarts, by role",
            about="None.",
            queries=(
                Query(
                    f"sum by (instance, role) (increase(durable_process_restarts_total{{{HERE}}}[$__rate_interval]))",
                    "{{instance}} {{role}}",
                ),
            ),
            unit="none",
            runbook="DurableRestartLoop",
        ),
        Panel(
            title="Refused commits",
            about="None. Each is a page whose window was taken over meanwhile: its steps run again elsewhere.",
            queries=(
                Query(
                    f"sum by (shard) (increase(durable_fenced_commits_total{{{HERE}}}[$__rate_interval]))",
                    "shard {{shard}}",
                ),
            ),
            unit="none",
            runbook="DurableFencedCommits",
        ),
        Panel(
            title="Consumers of the shard that has the fewest",
            about="As many as there are hosts (times `--consumers-per-shard`), and never 0.",
            queries=(Query(f"min(max by (shard) (durable_shard_consumers{{{HERE}}}))", "consumers"),),
            unit="none",
            runbook="DurableShardUnserved",
        ),
    ),
)

LATE = Row(
    "What was late",
    (
        Panel(
            title="Age of the oldest waiting step",
            about="Near zero.",
            queries=(Query(f"max(durable_lag_seconds{{{HERE}}})", "oldest"),),
            unit="s",
            runbook="DurableStepsWait",
            warns=60,
            alarms=300,
        ),
        Panel(
            title="Oldest timer that is due",
            about="Under a second.",
            queries=(Query(f"max(durable_timer_lag_seconds{{{HERE}}})", "late by"),),
            unit="s",
            runbook="DurableTimersLate",
            alarms=60,
        ),
        Panel(
            title="Oldest schedule that is due",
            about="Under a second, or not there: schedules are fired by maintenance.",
            queries=(Query(f"max(durable_schedule_lag_seconds{{{HERE}}})", "late by"),),
            unit="s",
            runbook="DurableSchedulesLate",
            warns=300,
        ),
    ),
)

UPKEEP = Row(
    "Upkeep",
    (
        Panel(
            title="Since the last rotation, oldest shard",
            about="Up to ten minutes.",
            queries=(Query(f"max(durable_rotation_age_seconds{{{HERE}}})", "oldest"),),
            unit="s",
            runbook="DurableRotationLate",
            warns=1800,
        ),
        Panel(
            title="Dead row versions",
            about="Thousands, up and down.",
            queries=(Query(f"sum(max by (relation) (durable_dead_tuples{{{HERE}}}))", "all tables"),),
            unit="short",
            runbook="DurableDeadTuples",
        ),
        Panel(
            title="Memory of the largest process",
            about="Flat.",
            queries=(Query(f"max by (instance) (durable_process_memory_bytes{{{HERE}}})", "{{instance}}"),),
            unit="bytes",
            runbook="DurableProcessMemory",
        ),
    ),
)

SIGHT = Row(
    "Whether it would be seen",
    (
        Panel(
            title="Metrics pages that answer",
            about="As many as there are hosts.",
            queries=(Query(f"sum(up{{{HERE}}})", "answer"), Query(f"count(up{{{HERE}}})", "known")),
            unit="none",
            runbook="DurableScrapeFails",
        ),
        Panel(
            title="Spans that were lost",
            about="None. The queue is bounded so that a collector that is slow or away never holds up a step.",
            queries=(
                Query(
                    f"sum by (instance) (rate(durable_spans_dropped_total{{{HERE}}}[$__rate_interval]))", "{{instance}}"
                ),
            ),
            unit="ops",
            runbook="DurableSpansDropped",
        ),
        Panel(
            title="How far the history is behind",
            about="Seconds; nothing where no history is kept. Beyond `history_lag_max_s` it skips ahead: timelines then have gaps.",
            queries=(Query(f"max(durable_history_lag_seconds{{{HERE}}})", "behind"),),
            unit="s",
            runbook="DurableHistoryLags",
            warns=120,
            alarms=300,
        ),
    ),
)

BOARD = Board(
    uid="durable-reliability",
    title="Durable: reliability",
    about="What broke, what was late, and whether anybody would have seen it. Choose a day or a week.",
    rows=(GLANCE, STEPS_THAT_FAIL, PROCESSES, LATE, UPKEEP, SIGHT),
)
