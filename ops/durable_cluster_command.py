"""Where the command begins, before the product is imported: Ctrl-C on the way ends it as it does later, without a traceback."""

from __future__ import annotations

import sys


def main() -> int:
    """See ``durable_cluster.ops.cli``."""
    try:
        from durable_cluster.ops import cli

        return cli.main()
    except KeyboardInterrupt:
        print("\ndurable-cluster: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
