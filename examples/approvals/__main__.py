"""``python -m durable_cluster.examples.approvals``: the workflows, the page, a purchase to try; ``--check`` plays through it."""

from __future__ import annotations

import argparse
import logging
import sys
import threading
from contextlib import suppress
from decimal import Decimal
from secrets import token_hex
from typing import Any

import psycopg

from durable_cluster.examples.approvals.check import check
from durable_cluster.examples.approvals.flows import Approver, Purchase, app, approval, prepare
from durable_cluster.examples.approvals.page import Page

PORT = 8_026
APPROVERS = (Approver("Grace", remind_after="1m", patience="3m"), Approver("Edsger"))
ROUND_S = 1.0


def main() -> int:
    """What the command line says."""
    parser = argparse.ArgumentParser(prog="python -m durable_cluster.examples.approvals", description=__doc__)
    parser.add_argument("--check", action="store_true", help="play approvers by HTTP, compare what came of it, and end")
    parser.add_argument("--port", type=int, default=PORT, help=f"where the page is (default: {PORT})")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        return check() if options.check else serve(options.port)
    finally:
        app.close()


def serve(port: int) -> int:
    """Run until Ctrl-C. What would be mailed is printed."""
    trial = Purchase(f"trial-{token_hex(3)}", "Ada", "A second monitor", Decimal("349.00"), APPROVERS)
    with psycopg.connect(app.client.dsn, autocommit=True) as connection, Page(app.client.dsn, port) as page:
        prepare(connection)
        threading.Thread(target=page.serve_forever, daemon=True).start()
        approval.start(trial, key=trial.ref)
        printed = 0
        with suppress(KeyboardInterrupt):
            while True:
                app.run(timeout=ROUND_S)
                printed = print_letters(connection, page, trial.ref, after=printed)
        page.shutdown()
    return 0


def print_letters(connection: psycopg.Connection[Any], page: Page, ref: str, *, after: int) -> int:
    """Those behind number ``after``; the number of the last."""
    for number, approver, kind, path in connection.execute(
        "select number, approver, kind, path from approvals.letter where ref = %s and number > %s order by number",
        (ref, after),
    ):
        print(f"{kind} to {approver}: http://{page.address}{path}", flush=True)
        after = number
    return after


if __name__ == "__main__":
    sys.exit(main())
