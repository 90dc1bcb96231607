"""The page as text. Whatever somebody has typed is escaped."""

from __future__ import annotations

from datetime import datetime
from decimal import Decimal
from html import escape

import msgspec

STYLE = """
:root { color-scheme: light dark; --ink: #1d2433; --soft: #5b6478; --line: #dde1ea; --ground: #f2f4f8; --card: #fff;
  --yes: #1a7f4b; --no: #b3372f }
@media (prefers-color-scheme: dark) {
  :root { --ink: #eceff5; --soft: #a3acbf; --line: #39414f; --ground: #14181f; --card: #1f252f; --yes: #1d8550; --no: #c44a41 } }
* { box-sizing: border-box }
body { margin: 0; padding: 6vh 1rem 2rem; background: var(--ground); color: var(--ink); font: 16px/1.5 system-ui, sans-serif }
main { max-width: 34rem; margin: 0 auto; padding: 1.75rem; background: var(--card);
  border: 1px solid var(--line); border-radius: 12px }
h1 { margin: 0 0 1.25rem; font-size: 1.35rem; line-height: 1.3; overflow-wrap: anywhere }
.kind { margin: 0 0 .25rem; color: var(--soft); font-size: .875rem }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .4rem 1.25rem; margin: 0 0 1.5rem }
dt { color: var(--soft) }
dd { margin: 0; overflow-wrap: anywhere }
.amount { font-weight: 600; font-variant-numeric: tabular-nums }
label { display: block; margin-bottom: .35rem; color: var(--soft) }
textarea { display: block; width: 100%; min-height: 4.5rem; padding: .6rem .75rem; font: inherit; color: inherit;
  background: var(--ground); border: 1px solid var(--line); border-radius: 8px; resize: vertical }
.buttons { display: flex; gap: .75rem; margin-top: 1.25rem }
button { flex: 1; min-height: 3rem; font: inherit; font-weight: 600; color: #fff; border: 0; border-radius: 8px; cursor: pointer }
button:focus-visible, textarea:focus-visible { outline: 3px solid #4a90d9; outline-offset: 2px }
.approved { background: var(--yes) }
.rejected { background: var(--no) }
.expired { background: var(--soft) }
.verdict { margin: 0; padding: .85rem 1rem; color: #fff; border-radius: 8px }
.verdict q { display: block; margin-top: .35rem; overflow-wrap: anywhere }
time { white-space: nowrap }
p:last-child { margin-bottom: 0 }
"""

FORM = """<form method="post">
<label for="note">A note, if you like</label><textarea id="note" name="note" maxlength="500"></textarea>
<div class="buttons"><button class="approved" name="decision" value="approved">Approve</button>
<button class="rejected" name="decision" value="rejected">Reject</button></div></form>"""


class Shown(msgspec.Struct, frozen=True):
    """What the page shows of a purchase to an approver."""

    ref: str
    asked_by: str
    what: str
    amount: Decimal
    approver: str
    status: str
    decided_by: str | None
    decided_at: datetime | None
    note: str | None

    @property
    def is_open(self) -> bool:
        return self.status == "open"


def page_of(shown: Shown) -> str:
    """The question with its two buttons, or what was decided."""
    return framed(
        shown.what,
        f'<p class="kind">Purchase {escape(shown.ref)}</p><h1>{escape(shown.what)}</h1>'
        f'<dl><dt>Amount</dt><dd class="amount">{shown.amount:,.2f} €</dd><dt>Asked for by</dt><dd>{escape(shown.asked_by)}</dd>'
        f"<dt>You are</dt><dd>{escape(shown.approver)}</dd></dl>{FORM if shown.is_open else verdict_of(shown)}",
    )


def verdict_of(shown: Shown) -> str:
    """What was decided, by whom, when."""
    at = "" if shown.decided_at is None else f" on <time>{shown.decided_at:%Y-%m-%d at %H:%M %Z}</time>"
    by = "" if shown.decided_by is None else f" by {escape(shown.decided_by)}"
    note = f"<q>{escape(shown.note)}</q>" if shown.note else ""
    return f'<p class="verdict {escape(shown.status)}"><strong>{escape(shown.status.capitalize())}</strong>{by}{at}.{note}</p>'


def framed(title: str, body: str) -> str:
    """A whole page."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><main>{body}</main></body></html>\n"
    )


NOT_VALID = framed(
    "Not valid",
    "<h1>This link is not valid</h1>"
    "<p>It may be mistyped, or the question has gone to somebody else meanwhile. Nothing was changed.</p>",
)
