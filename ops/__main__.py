"""``python -m durable_cluster.ops`` is ``durable-cluster``."""

import sys

from durable_cluster.ops.cli import main

if __name__ == "__main__":
    sys.exit(main())
