"""Why a goal is out of reach so far: the physical cost, and what was tried. By the criterion's words in ``verdicts``.

The figures are of the machine of ``docs/benchmarks``; where they stand without a command they were read from profiles of it.
"""

from __future__ import annotations

from types import MappingProxyType

_STEP = (
    "both cores are busy, and P is one session that has a core for itself. About 60 % of a step is Python (decode, "
    "the handler, encode, psycopg's send and receive), about 35 % Postgres (the chunk read and written through TOAST, its WAL, a "
    "tenth of a row in `finished`). Tried and kept: contexts and envelopes made in C, one encoding call a page, no exception in "
    "the encoder: a quarter less processor time a step. Tried and not kept, no difference beyond noise: pages of 4,000 lines."
)
_LONE = (
    "processor time, not the disk: a lone step is two calls of about 27 SQL statements in all; on the machine of 2026-11-21 they "
    "take 1.5 ms of a core, Python and libpq 0.5 ms, the flush of its commit 0.1 ms. Tried and kept: entering the log at the "
    "window's begin. Tried and not kept: a claim with three statements less (2 %)."
)

REASONS = MappingProxyType(
    {
        "steps/s, durable, four processes, with rotation": _STEP,
        "the same with asynchronous commit": "the disk is not what stops it: the rate is about that of durable commits. See above.",
        "CPU a step, Postgres and Python": "see above.",
        "WAL a step": (
            "the line itself, once; besides it the row and the index entry of `finished` that every tenth step writes, the chunk's "
            "TOAST rows, full pages after a checkpoint. A server with lz4 compresses the chunks (0.49 × on PostgreSQL 15 here); "
            "the embedded one is built without it."
        ),
        "throughput lost beside a held snapshot": (
            "the machine: its speed wanders by as much within a run, also without a snapshot (see the chart of throughput). What a "
            "snapshot itself costs is the next line: a slow machine slows Postgres and the workers alike."
        ),
        "idle: Postgres": "what autovacuum and the checkpointer still do for the load before, in one window of some seconds.",
        "lone chain, a step, p50": _LONE,
        "lone chain, a step, p99": "the same, beside what else the machine does.",
        "W2 lone ten-step flow, p50": "ten lone steps, a start, and the consumer's waking.",
        "W8 starts, one by one": (
            "a start is a commit with two rows (`started` with two index entries, the log) in about 12 SQL statements: 0.4 ms of "
            "processor time in Postgres and 0.15 ms in the client."
        ),
        "W8 starts, in batches": (
            "each start is a row of its own in `started`, with two index entries: more than P stores, which is "
            "one index entry a row. Tried and kept: all of a batch checked at once, ids from one random UUID, log entries cut "
            "without a sort: half the processor time a start."
        ),
    }
)
