"""The dashboard of a workflow type, for those who wrote it: how much of it there is, what it costs, how it ends, what fails."""

from __future__ import annotations

from durable_cluster.ops.dashboards.panels import Board, Choice, Panel, Query, Row, part_of, stat

HERE = 'job="$job",workflow=~"$workflow"'
ENDED = f"durable_workflows_ended_total{{{HERE}}}"
FAILED = f'durable_workflows_ended_total{{{HERE},status="failed"}}'
RETRIES = f"durable_retries_total{{{HERE}}}"
STEPS = f"durable_steps_total{{{HERE}}}"
CPU = f"durable_step_cpu_seconds_total{{{HERE}}}"
LETTERS = f"durable_dead_letters_total{{{HERE}}}"

GLANCE = Row(
    "What is wrong",
    (
        stat(
            title="Failed, of those that ended",
            about="What `fail` and errors that nobody caught make of it, over the time shown. What is normal is yours to say;"
            " `durable-cluster list --workflow NAME --status failed` names them.",
            expr=f"(sum(increase({FAILED}[$__range])) or vector(0)) / (sum(increase({ENDED}[$__range])) > 0) or vector(0)",
            unit="percentunit",
            width=6,
            warns=0.05,
            alarms=0.5,
            decimals=1,
        ),
        stat(
            title="Attempts that failed",
            about="Of all attempts, over the time shown: under 1 %. More: what the steps call is away or refuses.",
            expr=f"(sum(increase({RETRIES}[$__range])) or vector(0))"
            f" / (sum(increase({STEPS}[$__range])) + (sum(increase({RETRIES}[$__range])) or vector(0)) > 0) or vector(0)",
            unit="percentunit",
            runbook="DurableManyRetries",
            width=6,
            warns=0.05,
            alarms=0.25,
            decimals=1,
        ),
        stat(
            title="Dead letters",
            about="Over the time shown. 0; `durable-cluster dead-letters list --workflow NAME` says which and why.",
            expr=f"sum(increase({LETTERS}[$__range])) or vector(0)",
            runbook="DurableDeadLetters",
            width=6,
            warns=1,
            decimals=0,
        ),
        stat(
            title="Ended",
            about="Workflows that ended over the time shown, in whatever way.",
            expr=f"sum(increase({ENDED}[$__range])) or vector(0)",
            unit="short",
            width=6,
            decimals=0,
        ),
    ),
)

WORK = Row(
    "How much",
    (
        Panel(
            title="Step events",
            about="What your load makes of it.",
            queries=(Query(f"sum by (workflow) (rate({STEPS}[$__rate_interval]))", "{{workflow}}"),),
            unit="ops",
            is_stacked=True,
        ),
        Panel(
            title="Step events a workflow",
            about="Over the last hour: as many as the type has steps, sleeps and waits. A slow rise is a loop that gets longer.",
            queries=(
                Query(
                    f"sum by (workflow) (rate({STEPS}[1h])) / (sum by (workflow) (rate({ENDED}[1h])) > 0)",
                    "{{workflow}}",
                ),
            ),
            unit="short",
        ),
        Panel(
            title="Step events, by shard",
            about="Equal: ids are spread by chance. One shard above the others: few workflows with very many steps.",
            queries=(Query(f"sum by (shard) (rate({STEPS}[$__rate_interval]))", "shard {{shard}}"),),
            unit="ops",
            is_stacked=True,
        ),
    ),
)

COST = Row(
    "What it costs",
    (
        Panel(
            title="Processor time of its steps",
            about="In cores, by samples of what runs. Near the number of consumers: they have no time left for anything else.",
            queries=(Query(f"sum by (workflow) (rate({CPU}[$__rate_interval]))", "{{workflow}}"),),
            unit="none",
            width=12,
            is_stacked=True,
        ),
        Panel(
            title="Processor time a step event",
            about="Flat, whatever its height; microseconds to milliseconds. A jump after a deployment is that deployment's.",
            queries=(
                Query(
                    f"sum by (workflow) (rate({CPU}[$__rate_interval]))"
                    f" / (sum by (workflow) (rate({STEPS}[$__rate_interval])) > 0)",
                    "{{workflow}}",
                ),
            ),
            unit="s",
            width=12,
        ),
    ),
)

ENDS = Row(
    "How they end",
    (
        Panel(
            title="Ended, by status",
            about="Mostly completed.",
            queries=(Query(f"sum by (status) (rate({ENDED}[$__rate_interval]))", "{{status}}"),),
            unit="ops",
            width=12,
            is_stacked=True,
        ),
        Panel(
            title="Failed, of those that ended",
            about="Flat, whatever its height. A jump after a deployment is that deployment's.",
            queries=(
                Query(
                    f"sum by (workflow) (rate({FAILED}[$__rate_interval]))"
                    f" / (sum by (workflow) (rate({ENDED}[$__rate_interval])) > 0)",
                    "{{workflow}}",
                ),
            ),
            unit="percentunit",
            width=12,
        ),
    ),
)

TROUBLE = Row(
    "What fails on the way",
    (
        Panel(
            title="Retries",
            about="Few. A plateau is a service that is away, with every attempt of every workflow in it.",
            queries=(Query(f"sum by (workflow) (rate({RETRIES}[$__rate_interval]))", "{{workflow}}"),),
            unit="ops",
            runbook="DurableManyRetries",
        ),
        Panel(
            title="Attempts that failed",
            about="Of all attempts: under 1 %.",
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
            title="Dead letters",
            about="None.",
            queries=(Query(f"sum by (workflow) (increase({LETTERS}[$__rate_interval]))", "{{workflow}}"),),
            unit="none",
            runbook="DurableDeadLetters",
        ),
    ),
)

BOARD = Board(
    uid="durable-workflow",
    title="Durable: workflow type",
    about="One type of workflow, or some beside each other: choose above.",
    choices=(Choice("workflow", "durable_steps_total"),),
    rows=(GLANCE, WORK, COST, ENDS, TROUBLE),
)
