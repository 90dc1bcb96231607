"""``python -m durable_cluster.examples.web``: the service and its workflows in one process; ``--check`` plays a browser."""

from __future__ import annotations

import argparse
import logging
import sys

import uvicorn

from durable_cluster.examples.web.check import check
from durable_cluster.examples.web.flows import app
from durable_cluster.examples.web.service import service

PORT = 8_027


def main() -> int:
    """What the command line says."""
    parser = argparse.ArgumentParser(prog="python -m durable_cluster.examples.web", description=__doc__)
    parser.add_argument("--check", action="store_true", help="play a browser, compare what came of it, and end")
    parser.add_argument("--port", type=int, default=PORT, help=f"where the service is (default: {PORT})")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        if options.check:
            return check()
        uvicorn.run(service, port=options.port)
        return 0
    finally:
        app.close()


if __name__ == "__main__":
    sys.exit(main())
