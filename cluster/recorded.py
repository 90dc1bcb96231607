"""What a linear workflow has recorded, where its function is: what is new stands here, the rest in the database.

New entries travel in the step events until they have more than 8 KiB, or one of them more than 2 KiB; then all of them become the
next chunk of a chain, of which the events carry the name of the last. A chunk is written in the transaction of the first step event
that refers to it, and read when the function is entered anew. So n awaits write O(n) bytes, however large the memo grows.

What a loop or a scope has forgotten is dropped here, and of the chain the chunks at its end that hold nothing else. What is
forgotten of the others stays in them, until it is the larger half: then the memo is read, and begins anew with one chunk.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Sequence

import msgspec

from durable_cluster import memo
from durable_cluster.chunks import Chunks, input_of, parts_of
from durable_cluster.envelope import encode
from durable_cluster.errors import HandlerError
from durable_cluster.memo import BELOW, Asked, Carried, Chain, Chunk, Entry, Spilled, Stored

INLINE_BYTES_MAX = 8_192
VALUE_BYTES_MAX = 2_048
REF_BITS = 48
"""What a JSON number holds everywhere. Refs are random: what two runs of one step have written is told apart."""
RECORDED_ANEW = " loop"
"""How the key of an instant ends that each turn of a loop replaces."""
NO_REST = Carried()


class Kept:
    """A chunk of the chain. ``counts``: the bytes of what is not forgotten; ``loose``: of each key that may be."""

    __slots__ = ("counts", "forgotten", "loose", "ref", "size")

    def __init__(self, ref: int, size: int, sizes: Iterable[tuple[str, int]], forgotten: Iterable[str]) -> None:
        self.ref = ref
        self.size = size
        self.counts = 0
        self.loose: dict[str, int] = {}
        self.forgotten = tuple(forgotten)
        for key, item_size in sizes:
            self.counts += item_size
            if BELOW in key or key.endswith(RECORDED_ANEW):
                self.loose[key] = item_size

    def drop(self, key: str) -> None:
        """It does not count any more."""
        self.counts -= self.loose.pop(key, 0)


class Recorded:
    """The memo of one execution. ``chunks``: those of its workflow.

    ``carried``: what the step event carried; ``input``: the function's, as JSON; ``replay``: what is recorded, in order, with its
    bytes if the step events still carry it; ``rows``: to be written with the step event that is handed on.
    """

    __slots__ = (
        "_chain",
        "_chunks",
        "_entries",
        "_forgotten",
        "_head",
        "_inline_input",
        "_instants",
        "_is_cut",
        "_is_heavy",
        "_kept",
        "_keys",
        "_known",
        "_loops",
        "_met",
        "_size",
        "carried",
        "input",
        "replay",
        "rows",
        "workflow_id",
    )

    def __init__(self, carried: Carried, chunks: Chunks) -> None:
        self.carried = carried
        self.workflow_id = chunks.workflow_id
        self._chunks = chunks
        self._kept: list[Kept] = []
        self.rows: list[Spilled] = []
        self._loops: dict[str, Kept] = {}
        self._known: dict[str, msgspec.Raw] = {}
        self._met: set[str] | None = set() if carried.is_forked else None
        self._is_cut = False
        self._keys: list[str] = []
        self._entries: list[bytes] = []
        self._instants = dict(carried.instants)
        self._forgotten = set(carried.forgotten)
        self.input = self._inline_input = bytes(carried.input)
        self.replay: list[tuple[Entry, bytes | None]] = []
        self._chain: Chain | None = None
        self._head = b""
        self._size = 0
        self._is_heavy = len(self._inline_input) > VALUE_BYTES_MAX
        if carried.chain is not None:
            self.replay = self._loaded(carried, chunks.of(carried.chain))
        elif carried.entries is not memo.NO_ENTRIES:
            self.replay += memo.decoded_entries(carried.entries)
        if self._instants:
            self._weigh()

    def _loaded(self, carried: Carried, stored: Sequence[Stored]) -> list[tuple[Entry, bytes | None]]:
        """What is recorded, in the chain and in what is carried."""
        chunks = [one.chunk for one in stored]
        *parts, last = parts_of(carried, chunks)
        replay: list[tuple[Entry, bytes | None]] = []
        for one, part in zip(stored, parts, strict=True):
            sizes = _sizes([entry.key for entry, _ in part.entries], [of for _, of in part.entries], part.instants)
            input_size = len(bytes(one.chunk.input))
            self._keep(Kept(one.ref, one.size, [*sizes, ("", input_size)], one.chunk.forgotten))
            self._known.update(part.instants)
            replay += [(entry, None) for entry, _ in part.entries]
        self.input = bytes(input_of(carried, chunks))
        return [*replay, *last.entries]

    def state(self, key: str, args: bytes, rest: Carried | None) -> bytes:
        """What a step event carries of it, which await it answers, and the ``rest``, if there is any. Raises HandlerError."""
        if self._is_heavy:
            self._pack()
        if not self._head:
            self._set_head()
        if rest is None and not self._instants and not self._forgotten:
            # What most carry, put together in place of encoded.
            answers = b',"a":["%b",%b]' % (key.encode(), args) if key else b""
            return b'{%b"m":[%b]%b}' % (self._head, b",".join(self._entries), answers)
        return encode(self._carried(rest, Asked(key, msgspec.Raw(args)) if key else None))

    @property
    def size(self) -> int:
        """How many bytes of it count, wherever they stand."""
        return self._size + sum(kept.counts for kept in self._kept)

    def whole(self, rest: Carried | None) -> Carried:
        """All of it, wherever it stands, for who keeps histories. Raises HandlerError, Unreadable."""
        self._set_head()
        return self._chunks.whole(self._carried(rest, None))

    def _carried(self, rest: Carried | None, asked: Asked | None) -> Carried:
        return msgspec.structs.replace(
            rest or NO_REST,
            input=msgspec.Raw(self._inline_input) if self._inline_input else memo.NOTHING,
            entries=memo.encoded_entries(self._entries),
            asked=asked,
            instants=self._instants,
            chain=self._chain,
            forgotten=sorted(self._forgotten),
        )

    def drop_chain(self) -> None:
        """Nothing of it is recorded any more."""
        if self._kept:
            self.rows.append(Spilled(self.workflow_id, 0))

    def taken(self) -> list[Spilled]:
        """The rows, which somebody writes now."""
        rows, self.rows = self.rows, []
        return rows

    def replayed(self) -> None:
        """The function has come to where it was: what it has asked for it does not ask for again."""
        self._known = {}
        if self._met is not None:  # the other instants of a fork are of the original's further life
            self._instants = {key: value for key, value in self._instants.items() if key in self._met}
            self._met = None
            self._weigh()

    def record(self, key: str, encoded: bytes) -> None:
        """What an await came to."""
        self._keys.append(key)
        self._entries.append(encoded)
        size = len(encoded)
        self._size += size + 1
        if size > VALUE_BYTES_MAX or self._size > INLINE_BYTES_MAX:
            self._is_heavy = True

    def instant(self, key: str) -> msgspec.Raw | None:
        """What was recorded without a step, if it was."""
        if self._met is not None:
            self._met.add(key)
        known = self._instants.get(key)
        return self._known.get(key) if known is None else known

    def set_instant(self, key: str, value: msgspec.Raw) -> None:
        """From now on."""
        if (kept := self._loops.pop(key, None)) is not None:
            kept.drop(key)
            self._is_heavy = True
        self._instants[key] = value
        self._size += _size(key, value)
        if len(bytes(value)) > VALUE_BYTES_MAX or self._size > INLINE_BYTES_MAX:
            self._is_heavy = True

    def forget(self, position: str) -> None:
        """Drop what is recorded of awaits whose position begins so: what they led to is recorded."""
        pairs = [(key, of) for key, of in zip(self._keys, self._entries, strict=True) if not key.startswith(position)]
        self._keys, self._entries = [key for key, _ in pairs], [of for _, of in pairs]
        for key in [key for key in self._instants if key.startswith(position)]:
            del self._instants[key]
        is_in_chain = False
        for kept in self._kept:
            gone = [key for key in kept.loose if key.startswith(position)]
            for key in gone:
                kept.drop(key)
            is_in_chain |= bool(gone)
        if is_in_chain:
            self._forgotten = {one for one in self._forgotten if not one.startswith(position)} | {position}
        was_heavy = bool(self._kept) and self._is_heavy
        self._weigh()
        self._is_heavy |= was_heavy or is_in_chain

    def _pack(self) -> None:
        """Let what is large, or much, become a chunk, and let go of what nobody needs."""
        while self._kept and not self._kept[-1].counts:
            self._forgotten.update(self._kept.pop().forgotten)
            self._is_cut = True
        if not self._kept:
            self._forgotten.clear()
        elif not self.rows and self._is_mostly_forgotten():
            self._begin_anew()
        self._weigh()
        if self._is_heavy:
            self._spill()
        elif self._is_cut:
            self.rows.append(Spilled(self.workflow_id, len(self._kept)))
        self._is_heavy = self._is_cut = False
        self._set_head()

    def _weigh(self) -> None:
        sizes = [len(encoded) for encoded in self._entries]
        values = [len(bytes(value)) for value in self._instants.values()]
        self._size = sum(sizes) + len(sizes) + sum(values) + sum(len(key) + 4 for key in self._instants)
        largest = max((len(self._inline_input), *sizes, *values))
        self._is_heavy = largest > VALUE_BYTES_MAX or self._size > INLINE_BYTES_MAX

    def _set_head(self) -> None:
        """The beginning of a state."""
        kept = self._kept
        self._chain = Chain(kept[-1].ref, len(kept), sum(one.size for one in kept)) if kept else None
        self._head = b'"i":%b,' % self._inline_input if self._inline_input else b""
        if self._chain is not None:
            self._head += b'"c":%b,' % encode(self._chain)

    def _spill(self) -> None:
        of = self._chunks
        size, limit = self.size, of.app.settings.memo_bytes_max
        if size > limit:
            by = f" by {memo.told(self._keys[-1])}" if self._keys else ""
            raise HandlerError(
                f"workflow '{of.workflow}' has recorded {size:,} bytes{by}; the limit is {limit:,} (memo_bytes_max): let loop()"
                " or scope() forget what is done with, begin again with continue_as_new(), or record references"
            )
        is_input_large = len(self._inline_input) > VALUE_BYTES_MAX
        chunk = Chunk(
            self._kept[-1].ref if self._kept else 0,
            msgspec.Raw(self._inline_input) if is_input_large else memo.NOTHING,
            memo.encoded_entries(self._entries),
            self._instants,
            sorted(self._forgotten),
        )
        try:
            text = of.spilled(chunk)
        except (TypeError, ValueError, RecursionError, msgspec.MsgspecError) as error:
            raise HandlerError(f"workflow '{of.workflow}' has recorded what is not JSON: {error}") from error
        sizes = _sizes(self._keys, self._entries, self._instants)
        if is_input_large:
            sizes.append(("", len(self._inline_input)))
            self._inline_input = b""
        ref = secrets.randbits(REF_BITS) or 1
        self.rows.append(Spilled(self.workflow_id, len(self._kept), ref, text))
        self._keep(Kept(ref, len(text.encode()), sizes, self._forgotten))
        self._keys, self._entries, self._instants, self._forgotten, self._size = [], [], {}, set(), 0

    def _keep(self, kept: Kept) -> None:
        self._kept.append(kept)
        for key in kept.loose:
            if key.endswith(RECORDED_ANEW):
                self._loops[key] = kept

    def _is_mostly_forgotten(self) -> bool:
        size, counts = sum(kept.size for kept in self._kept), sum(kept.counts for kept in self._kept)
        return size > 2 * counts + INLINE_BYTES_MAX

    def _begin_anew(self) -> None:
        """Read the chain, and carry what counts of it: it becomes one chunk."""
        known = self.whole(None)
        pairs = memo.decoded_entries(known.entries)
        self._keys, self._entries = [entry.key for entry, _ in pairs], [encoded for _, encoded in pairs]
        self._instants, self._inline_input = dict(known.instants), bytes(known.input)
        self._kept, self._loops, self._forgotten, self._is_cut = [], {}, set(), True


def _size(key: str, value: msgspec.Raw) -> int:
    """Of an instant, as JSON."""
    return len(key) + len(bytes(value)) + 4


def _sizes(keys: Iterable[str], entries: Iterable[bytes], instants: dict[str, msgspec.Raw]) -> list[tuple[str, int]]:
    """Of all that a chunk holds, by key."""
    sizes = [(key, len(encoded) + 1) for key, encoded in zip(keys, entries, strict=True)]
    return sizes + [(key, _size(key, value)) for key, value in instants.items()]
