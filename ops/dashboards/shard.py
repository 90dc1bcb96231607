"""The dashboard of one shard, or of some: where the time of its steps goes, and what its process does."""

from __future__ import annotations

from durable_cluster.ops.dashboards.panels import Board, Choice, Panel, Query, Row, quantiles, stat

HERE = 'job="$job",shard=~"$shard"'

GLANCE = Row(
    "What is wrong",
    (
        stat(
            title="Fewest consumers of a shard",
            about="As many as there are hosts (times `--consumers-per-shard`). 0: nobody reads it, its work stands still.",
            expr=f"min(max by (shard) (durable_shard_consumers{{{HERE}}}))",
            runbook="DurableShardUnserved",
            width=4,
            warns=1,
            alarms=0.5,
        ),
        stat(
            title="Oldest step waits",
            about="Well under a second. Longer on this shard alone: it is paused, or one workflow keeps its process busy.",
            expr=f"max(durable_lag_seconds{{{HERE}}})",
            unit="s",
            runbook="DurableStepsWait",
            width=4,
            warns=60,
            alarms=300,
        ),
        stat(
            title="Step events in the log",
            about="What runs and what waits behind it. Workflows go to shards by their ids, so shards differ little.",
            expr=f"sum(max by (shard) (durable_lag_events{{{HERE}}}))",
            unit="short",
            runbook="DurableLagGrows",
            width=4,
        ),
        stat(
            title="Step events a second",
            about="What your load makes of it.",
            expr=f"sum(rate(durable_steps_total{{{HERE}}}[$__rate_interval])) or vector(0)",
            unit="ops",
            width=4,
        ),
        stat(
            title="Refused commits, last hour",
            about="0, or one when a process was stopped for a while and its work was taken over: the fence did its duty. Again and"
            " again: processes stand still for longer than `dead_interval_s`.",
            expr=f"sum(increase(durable_fenced_commits_total{{{HERE}}}[1h])) or vector(0)",
            runbook="DurableFencedCommits",
            width=4,
            warns=5,
            decimals=0,
        ),
        stat(
            title="Restarts, last hour",
            about="0. Each is a process that ended unasked.",
            expr=f"sum(increase(durable_process_restarts_total{{{HERE}}}[1h])) or vector(0)",
            runbook="DurableRestartLoop",
            width=4,
            warns=3,
            decimals=0,
        ),
    ),
)

THROUGHPUT = Row(
    "Throughput",
    (
        Panel(
            title="Step events",
            about="Equal for all shards while there is work for all.",
            queries=(
                Query(f"sum by (shard) (rate(durable_steps_total{{{HERE}}}[$__rate_interval]))", "shard {{shard}}"),
            ),
            unit="ops",
        ),
        Panel(
            title="Pages",
            about="A page is one commit: tens to hundreds a second under load.",
            queries=(
                Query(f"sum by (shard) (rate(durable_pages_total{{{HERE}}}[$__rate_interval]))", "shard {{shard}}"),
            ),
            unit="ops",
        ),
        Panel(
            title="Step events a page",
            about="1 for a lone workflow, up to 1,000 behind a backlog: the busier, the cheaper. Low beside a backlog: slow `def`"
            " steps cut the pages.",
            queries=(
                Query(
                    f"sum by (shard) (rate(durable_page_steps_sum{{{HERE}}}[$__rate_interval]))"
                    f" / (sum by (shard) (rate(durable_page_steps_count{{{HERE}}}[$__rate_interval])) > 0)",
                    "shard {{shard}}",
                ),
            ),
            unit="short",
        ),
    ),
)

TIME = Row(
    "Where the time goes",
    (
        Panel(
            title="Pages: how long their steps ran",
            about="Dark near the bottom; the page window (50 ms) is the upper edge. Fields above it are steps that block.",
            queries=(
                Query(
                    f"sum by (le) (increase(durable_page_duration_seconds_bucket{{{HERE}}}[$__rate_interval]))",
                    "{{le}}",
                ),
            ),
            unit="s",
            kind="heatmap",
        ),
        Panel(
            title="Commits",
            about="Milliseconds. One shard above the others: its transactional steps wait for locks.",
            queries=quantiles("durable_commit_duration_seconds", HERE, by="shard"),
            unit="s",
        ),
        Panel(
            title="Claims",
            about="A millisecond or a few.",
            queries=quantiles("durable_claim_duration_seconds", HERE, by="shard"),
            unit="s",
        ),
    ),
)

BACKLOG = Row(
    "Backlog",
    (
        Panel(
            title="Step events in the log",
            about="Rises with a burst, and falls again.",
            queries=(Query(f"max by (shard) (durable_lag_events{{{HERE}}})", "shard {{shard}}"),),
            unit="short",
            runbook="DurableLagGrows",
        ),
        Panel(
            title="Age of the oldest waiting step",
            about="Near zero.",
            queries=(Query(f"max by (shard) (durable_lag_seconds{{{HERE}}})", "shard {{shard}}"),),
            unit="s",
            runbook="DurableStepsWait",
            warns=60,
            alarms=300,
        ),
        Panel(
            title="Detached steps that run",
            about="Slow `async` and `blocking=True` steps: calls of other services. At most `detached_max` (1,000) a process.",
            queries=(Query(f"sum by (shard) (durable_detached_steps{{{HERE}}})", "shard {{shard}}"),),
            unit="short",
        ),
    ),
)

PROCESS = Row(
    "Its processes",
    (
        Panel(
            title="Processor time",
            about="1 is a core, and all that one process has. At 1, more consumers a shard help, or more hosts.",
            queries=(
                Query(
                    f"max by (shard, instance) (rate(durable_process_cpu_seconds_total{{{HERE}}}[$__rate_interval]))",
                    "shard {{shard}} {{instance}}",
                ),
            ),
            unit="none",
            alarms=0.95,
        ),
        Panel(
            title="Memory",
            about="Some 40 MiB and what your code loads; flat. It is one page, whatever waits.",
            queries=(
                Query(
                    f"max by (shard, instance) (durable_process_memory_bytes{{{HERE}}})", "shard {{shard}} {{instance}}"
                ),
            ),
            unit="bytes",
            runbook="DurableProcessMemory",
        ),
        Panel(
            title="Restarts and refused commits",
            about="None. A restart is followed by refused commits only where somebody stopped a process and woke it again.",
            queries=(
                Query(
                    f"sum by (shard) (increase(durable_process_restarts_total{{{HERE}}}[$__rate_interval]))",
                    "restarts, shard {{shard}}",
                ),
                Query(
                    f"sum by (shard) (increase(durable_fenced_commits_total{{{HERE}}}[$__rate_interval]))",
                    "refused, shard {{shard}}",
                ),
            ),
            unit="none",
            runbook="DurableRestartLoop",
        ),
    ),
)

LOG = Row(
    "Its log",
    (
        Panel(
            title="Size",
            about="Grows, and is emptied by a rotation every ten minutes while it is read.",
            queries=(Query(f"max by (shard) (durable_log_bytes{{{HERE}}})", "shard {{shard}}"),),
            unit="bytes",
            runbook="DurableRotationLate",
        ),
        Panel(
            title="Since the last rotation",
            about="Up to ten minutes; 0 while nothing is in it.",
            queries=(Query(f"max by (shard) (durable_rotation_age_seconds{{{HERE}}})", "shard {{shard}}"),),
            unit="s",
            runbook="DurableRotationLate",
            warns=1800,
        ),
        Panel(
            title="Steps that no code here knows",
            about="None, a few while old and new code run beside each other. They come back for a day, then they are dead letters.",
            queries=(
                Query(
                    f"sum by (shard) (rate(durable_unroutable_total{{{HERE}}}[$__rate_interval]))", "shard {{shard}}"
                ),
            ),
            unit="ops",
            runbook="DurableUnroutable",
        ),
    ),
)

BOARD = Board(
    uid="durable-shard",
    title="Durable: shard",
    about="Shards beside each other, or one alone: choose above.",
    choices=(Choice("shard", "durable_lag_seconds"),),
    rows=(GLANCE, THROUGHPUT, TIME, BACKLOG, PROCESS, LOG),
)
