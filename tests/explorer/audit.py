"""What must hold after every schedule, whatever its order: asked of the tables, with everything committed or rolled back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import psycopg

# One function, so that its plans are kept: it is asked twice a schedule. ``since``: a transaction id before its
# workflow's first.
FUNCTION = """
create function audit(i_id uuid, since xid8, is_settled boolean,
    out places text[], out missed bigint, out repeated text[], out effects text[], out outcome text,
    out orphans bigint)
language plpgsql set plan_cache_mode = force_generic_plan set enable_seqscan = off
as $$
begin
    places := array(
        select 'timer' from durable.timer t, durable.timer_control c
        where t.txid >= since and t.workflow_id = i_id and t.line is not null
            and ((t.due, t.id) > (c.reached_due, c.reached_id) or not pg_visible_in_snapshot(t.txid, c.seen))
        union all
        select case when w.names is null then 'sleep' else 'wait' end from durable.wait w where w.id = i_id
        union all
        select 'detached' from durable.detached d where d.id = i_id
        union all
        select 'parked' from durable.parked p where p.id = i_id
        union all
        select 'queued' from durable.queued q where q.id = i_id
        union all
        select 'dead letter' from durable.dead_letter d where d.id = i_id
        union all
        select 'end' from durable.finished f where f.id = i_id and f.day = durable.day_of(i_id));
    if not is_settled then
        places := places || array(
            select l.place from durable.locate(i_id) l where l.place in ('queued', 'claimed') and l.step is not null);
    end if;
    missed := (
        select count(*) from durable.wait w join durable.mailbox m on m.id = w.id and m.name = any (w.names)
        where w.id = i_id and (w.token_seq is null or w.token_seq = m.token_seq));
    repeated := array(
        select substring(l.line from durable.line_pattern('s'))
        from pgque.event_1 e, string_to_table(e.ev_data, E'\\n') l(line)
        where e.ev_txid >= since and l.line like '{"w":"' || durable.hex(i_id) || '"%' and l.line not like '%,"f":"@%'
        group by split_part(substr(l.line, 45, 12), ',', 1), 1 having count(*) > 1);
    orphans := (
        select count(*) from durable.started s where s.parent = i_id and durable.is_live(s.id)
            and exists (select from durable.finished f where f.id = i_id and f.status = 'cancelled'));
    effects := array(select e.step from effect e where e.id = i_id);
    outcome := (
        select case f.status when 'completed' then f.output::json #>> '{}' else f.status end
        from durable.finished f where f.id = i_id and f.day = durable.day_of(i_id));
end
$$
"""


class Finding(msgspec.Struct, frozen=True):
    """Where a workflow stands, and what of it there is twice. ``outcome``: what it came to, if it has ended;
    ``orphans``: its children that live although it was cancelled."""

    places: list[str]
    missed: int
    repeated: list[str]
    effects: list[str]
    outcome: str | None
    orphans: int

    def broken(self, *, may_repeat: bool) -> str | None:
        """The invariant that does not hold. ``may_repeat``: a step that stood aside may have been put back into the log."""
        if len(self.places) != 1:
            return f"I1: it has {len(self.places)} live continuations: {', '.join(self.places) or 'none'}"
        if self.missed:
            return "I7: it waits for a signal that lies in its mailbox"
        if self.repeated and not may_repeat:
            return f"I3: appended twice: {', '.join(self.repeated)}"
        if len(set(self.effects)) < len(self.effects):
            return f"I2: effects were committed twice: {', '.join(self.effects)}"
        return None

    def at_the_end(self, outcomes: tuple[str, ...], *, is_paid: bool) -> str | None:
        """What is wrong with how a workflow has ended, or that it has not."""
        if self.outcome is None:
            return f"it stays where it is: {', '.join(self.places)}"
        if self.outcome not in outcomes:
            return f"it came to '{self.outcome}', not to one of {', '.join(outcomes)}"
        if self.orphans:
            return f"it was cancelled, and {self.orphans} of its children live"
        is_cancelled = self.outcome == "cancelled"
        if ("clean" in self.effects) != is_cancelled:
            return f"I2: {self.outcome}, and the steps that left something are {', '.join(self.effects) or 'none'}"
        if is_paid and "begin" not in self.effects and not is_cancelled:
            return "I2: it went on without what its first step did"
        return None


def audit(
    connection: psycopg.Connection[Any], ids: Sequence[str], since: str, *, is_settled: bool = False
) -> list[Finding]:
    """Ask for these workflows, in their order. ``is_settled``: everything in the log is done, which spares the search."""
    rows = connection.execute(
        "select a.* from unnest(%s::uuid[]) with ordinality i(id, place), audit(i.id, %s::xid8, %s) a order by i.place",
        (list(ids), since, is_settled),
    )
    return [Finding(*row) for row in rows]
