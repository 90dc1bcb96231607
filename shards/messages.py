"""What a supervisor and its children say to each other over their pipes: msgspec bytes, never pickles."""

from __future__ import annotations

import msgspec

from durable_cluster.meters import Report
from durable_cluster.settings import Settings


class ClusterConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What every process of a cluster needs to know."""

    dsn: str
    app: str
    shards: int
    consumers_per_shard: int
    settings: Settings
    log_level: str = "WARNING"
    log_format: str = "plain"


class Ready(msgspec.Struct, frozen=True, tag=True):
    """A child is up. ``owner``: its incarnation's bits; zero for one that owns no windows."""

    owner: int


class Beat(msgspec.Struct, frozen=True, tag=True):
    """A child lives; whether it holds a window, and what it has counted."""

    owner: int
    is_holding: bool
    report: Report


class Broken(msgspec.Struct, frozen=True, tag=True):
    """A child cannot boot, and why."""

    reason: str


class Adopt(msgspec.Struct, frozen=True, tag=True):
    """Read this shard too: its consumer died, its windows are free."""

    shard: int


class Release(msgspec.Struct, frozen=True, tag=True):
    """Stop reading this adopted shard: its own consumer is back."""

    shard: int


FromChild = Ready | Beat | Broken
ToChild = Adopt | Release

encode = msgspec.msgpack.Encoder().encode
decode_from_child = msgspec.msgpack.Decoder(FromChild).decode
decode_to_child = msgspec.msgpack.Decoder(ToChild).decode
decode_config = msgspec.msgpack.Decoder(ClusterConfig).decode
