"""The dashboard to open first: what is wrong, then what is worked on, what waits, and what that costs."""

from __future__ import annotations

from durable_cluster.ops.dashboards.panels import FIRING, Board, Panel, Query, Row, quantiles, stat

HERE = 'job="$job"'

WRONG = Row(
    "What is wrong",
    (
        stat(
            title="Alerts that fire",
            about="0, or read the list below and follow the runbook of the most severe one. Needs alerts.yml in Prometheus.",
            expr=f"count({FIRING}) or vector(0)",
            width=3,
            alarms=1,
        ),
        stat(
            title="Hosts not seen",
            about="Metrics pages that Prometheus knows and cannot read. 0; a host that is gone leaves its work to the others.",
            expr=f"sum(1 - up{{{HERE}}})",
            runbook="DurableScrapeFails",
            width=3,
            alarms=1,
        ),
        stat(
            title="Hosts without Postgres",
            about="Hosts whose supervisor gets no answer from the database in time. 0; above it, what the database itself says"
            " on this page is old.",
            expr=f"sum(1 - durable_database_up{{{HERE}}})",
            runbook="DurableDatabaseDown",
            width=3,
            alarms=1,
        ),
        stat(
            title="Shards nobody reads",
            about="0. Work of such a shard stands still, whatever the others do.",
            expr=f"count(max by (shard) (durable_shard_consumers{{{HERE}}}) == 0) or vector(0)",
            runbook="DurableShardUnserved",
            width=3,
            alarms=1,
        ),
        stat(
            title="Oldest step waits",
            about="Well under a second, minutes while a large batch of starts is worked off. Beyond that: more work than the"
            " processes can do, a shard that is paused, or nobody who reads it.",
            expr=f"max(durable_lag_seconds{{{HERE}}})",
            unit="s",
            runbook="DurableStepsWait",
            width=3,
            warns=60,
            alarms=300,
        ),
        stat(
            title="Oldest timer is late",
            about="Under a second. Later: nobody fires timers, or more are due at once than can be fired.",
            expr=f"max(durable_timer_lag_seconds{{{HERE}}})",
            unit="s",
            runbook="DurableTimersLate",
            width=3,
            warns=5,
            alarms=60,
        ),
        stat(
            title="Stuck workflows",
            about="Dead letters that wait for somebody. 0; each needs the code or the world mended, and a retry.",
            expr=f"max(durable_stuck_workflows{{{HERE}}})",
            runbook="DurableDeadLetters",
            width=3,
            warns=1,
        ),
        stat(
            title="Processes missing",
            about="0, a few for seconds after one was killed. Longer: they die as they start; the cluster's log says of what.",
            expr=f"sum(clamp_min(durable_processes_expected{{{HERE}}} - durable_processes{{{HERE}}}, 0))",
            runbook="DurableProcessMissing",
            width=3,
            warns=1,
        ),
        Panel(
            title="Which alerts fire",
            about="The most severe first. `critical` wakes somebody, `warning` waits for the morning.",
            queries=(Query(FIRING),),
            unit="none",
            kind="table",
            width=12,
        ),
        Panel(
            title="Age of the oldest waiting step, by shard",
            about="Near zero, and equal for all. One shard above the others is paused, or holds a step that takes its process"
            " with it; all of them rising is too much work.",
            queries=(Query(f"max by (shard) (durable_lag_seconds{{{HERE}}})", "shard {{shard}}"),),
            unit="s",
            runbook="DurableStepsWait",
            width=12,
            warns=60,
            alarms=300,
        ),
    ),
)

WORK = Row(
    "Work",
    (
        Panel(
            title="Step events, by workflow type",
            about="What your load makes of it. At nothing while steps wait: an outage. At nothing with none waiting: a quiet hour.",
            queries=(
                Query(
                    f"sum by (workflow) (rate(durable_steps_total{{{HERE}}}[$__rate_interval]))",
                    "{{workflow}}",
                ),
            ),
            unit="ops",
            width=12,
            is_stacked=True,
        ),
        Panel(
            title="Workflows that ended",
            about="Mostly completed. A share of failed ones that grows is your own code's answer: see the dashboard of the type.",
            queries=(
                Query(
                    f"sum by (status) (rate(durable_workflows_ended_total{{{HERE}}}[$__rate_interval]))",
                    "{{status}}",
                ),
            ),
            unit="ops",
            width=6,
            is_stacked=True,
        ),
        Panel(
            title="Retries and dead letters",
            about="Few retries, no dead letters. Many retries of one type: what its steps call is away.",
            queries=(
                Query(f"sum(rate(durable_retries_total{{{HERE}}}[$__rate_interval]))", "retries"),
                Query(f"sum(rate(durable_dead_letters_total{{{HERE}}}[$__rate_interval]))", "dead letters"),
            ),
            unit="ops",
            runbook="DurableManyRetries",
            width=6,
        ),
        Panel(
            title="Pages: steps run",
            about="The median is milliseconds, the slowest near the page window (50 ms). Longer: a plain `def` step blocks; make it"
            " `blocking=True`.",
            queries=quantiles("durable_page_duration_seconds", HERE),
            unit="s",
        ),
        Panel(
            title="Pages: commit",
            about="Milliseconds: the server's flush of its WAL. Longer: its disks, a lock, or slow transactional steps.",
            queries=quantiles("durable_commit_duration_seconds", HERE),
            unit="s",
        ),
        Panel(
            title="Claims",
            about="A millisecond or a few. Longer together with commits: the server is busy; alone: an old snapshot is held.",
            queries=quantiles("durable_claim_duration_seconds", HERE),
            unit="s",
            runbook="DurableRotationLate",
        ),
    ),
)

WAITING = Row(
    "What waits",
    (
        Panel(
            title="Step events in the log",
            about="What runs now, and what waits behind it. It rises with a burst of starts and falls again; rising for long:"
            " more comes in than is done.",
            queries=(Query(f"sum(max by (shard) (durable_lag_events{{{HERE}}}))", "step events"),),
            unit="short",
            runbook="DurableLagGrows",
        ),
        Panel(
            title="Workflows that wait by themselves",
            about="Sleepers, waits for signals and for children cost nothing while they wait. Waits for signals that only grow are"
            " forgotten ones: give them a timeout.",
            queries=(
                Query(f"max(durable_sleeping_workflows{{{HERE}}})", "asleep"),
                Query(f"max(durable_waits_open{{{HERE}}})", "for a signal"),
                Query(f"max(durable_joins_open{{{HERE}}})", "for children"),
            ),
            unit="short",
        ),
        Panel(
            title="Steps that wait for room",
            about="Near zero. For a permit: a limit is full. Parked: a type or a workflow is paused. Detached, not begun: more slow"
            " steps than the processes take at once (`detached_max`).",
            queries=(
                Query(f"max(durable_queued_steps{{{HERE}}})", "for a permit of a limit"),
                Query(f"max(durable_parked_steps{{{HERE}}})", "parked by a pause"),
                Query(f"max(durable_detached_waiting{{{HERE}}})", "detached, not begun"),
                Query(f"sum(durable_detached_steps{{{HERE}}})", "detached, running"),
            ),
            unit="short",
        ),
    ),
)

PROCESSES = Row(
    "Processes",
    (
        Panel(
            title="Processes",
            about="A flat line: shards + 2 on each host. Steps in it are deployments, or deaths.",
            queries=(Query(f"sum by (instance, role) (durable_processes{{{HERE}}})", "{{instance}} {{role}}"),),
            unit="none",
            runbook="DurableProcessMissing",
        ),
        Panel(
            title="Restarts",
            about="None. Each is a process that ended unasked. A step that kills its process is a dead letter the third time.",
            queries=(
                Query(
                    f"sum by (instance) (increase(durable_process_restarts_total{{{HERE}}}[$__rate_interval]))",
                    "{{instance}}",
                ),
            ),
            unit="none",
            runbook="DurableRestartLoop",
        ),
        Panel(
            title="Memory, by host",
            about="Some 40 MiB a process and what your code loads. A slope that does not end is a leak in a step.",
            queries=(
                Query(f"sum by (instance) (durable_process_memory_bytes{{{HERE}}})", "{{instance}}"),
                Query(f"max(durable_process_memory_bytes{{{HERE}}})", "largest process"),
            ),
            unit="bytes",
            runbook="DurableProcessMemory",
        ),
        Panel(
            title="Processor time, by host",
            about="1 is a core. A consumer is one process: at 1 for a shard it has no more to give, and more shards do.",
            queries=(
                Query(
                    f"sum by (instance) (rate(durable_process_cpu_seconds_total{{{HERE}}}[$__rate_interval]))",
                    "{{instance}}",
                ),
            ),
            unit="none",
            width=12,
        ),
        Panel(
            title="Processor time a step event",
            about="Microseconds for trivial steps, and what your code takes. A jump after a deployment is that code's.",
            queries=(
                Query(
                    f"sum(rate(durable_process_cpu_seconds_total{{{HERE}}}[$__rate_interval]))"
                    f" / (sum(rate(durable_steps_total{{{HERE}}}[$__rate_interval])) > 0)",
                    "per step event",
                ),
            ),
            unit="s",
            width=12,
        ),
    ),
)

POSTGRES = Row(
    "Postgres",
    (
        Panel(
            title="WAL of the server",
            about="In step with the step events. It counts everybody's on that server.",
            queries=(Query(f"max(rate(durable_wal_bytes_total{{{HERE}}}[$__rate_interval]))", "WAL"),),
            unit="Bps",
        ),
        Panel(
            title="WAL a step event",
            about="Some 200 bytes and the payload. Much more: few steps a commit, large payloads, or others write to this server.",
            queries=(
                Query(
                    f"max(rate(durable_wal_bytes_total{{{HERE}}}[$__rate_interval]))"
                    f" / (sum(rate(durable_steps_total{{{HERE}}}[$__rate_interval])) > 0)",
                    "per step event",
                ),
            ),
            unit="bytes",
        ),
        Panel(
            title="Logs of the shards",
            about="A saw's teeth: a rotation empties them every ten minutes. No fall for an hour: something holds rotation back.",
            queries=(Query(f"sum(max by (shard) (durable_log_bytes{{{HERE}}}))", "logs and indexes"),),
            unit="bytes",
            runbook="DurableRotationLate",
        ),
        Panel(
            title="Since the last rotation, oldest shard",
            about="Up to ten minutes, 0 with an empty log. Above thirty: an old snapshot is held, or maintenance does not run.",
            queries=(Query(f"max(durable_rotation_age_seconds{{{HERE}}})", "oldest"),),
            unit="s",
            runbook="DurableRotationLate",
            width=12,
            warns=1800,
        ),
        Panel(
            title="Dead row versions, the five worst tables",
            about="Thousands, up and down with autovacuum: no step updates a row. Only up: an old snapshot is held.",
            queries=(Query(f"topk(5, max by (relation) (durable_dead_tuples{{{HERE}}}))", "{{relation}}"),),
            unit="short",
            runbook="DurableDeadTuples",
            width=12,
            warns=1_000_000,
        ),
    ),
)

BOARD = Board(
    uid="durable-cluster",
    title="Durable: cluster",
    about="One cluster at a glance. The first line is what is wrong; a red field names its runbook.",
    rows=(WRONG, WORK, WAITING, PROCESSES, POSTGRES),
)
