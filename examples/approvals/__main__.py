"""``python -m durable_cluster.examples.approvals``: the workflows, the page and one purchase to try; ``--check`` plays through it."""

from __future__ import annotations

import argparse
import logging
import sys
import threading
from contextlib import suppress
from decimal import Decimal

import psycopg

from durable_cluster.examples.approvals.check import check
from durable_cluster.examples.approvals.flows import Approver, Purchase, app, approval, prepare
from durable_cluster.examples.approvals.page import Page

PORT = 8_026
TRIAL = Purchase("2026-17", "Ada", "A second monitor", Decimal("349.00"), (Approver("Grace"), Approver("Edsger")))


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
    with psycopg.connect(app.client.dsn, autocommit=True) as connection, Page(app.client.dsn, port) as page:
        prepare(connection)
        threading.Thread(target=page.serve_forever, daemon=True).start()
        approval.start(TRIAL, key=TRIAL.ref)
        app.run(timeout=2)
        for approver, path in connection.execute("select approver, path from approvals.letter order by number"):
            print(f"mail to {approver}: http://{page.address}{path}", flush=True)
        with suppress(KeyboardInterrupt):
            app.run()
        page.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
