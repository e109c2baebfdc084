"""A drill of the engine (design section 5): transactions that interleave end as if one had come after the other."""

from mendfs.errors import Conflict, MendfsError
from mendfs.kv.memory import MemoryEngine
from mendfs.kv.optimistic import OptimisticTransaction
from mendfs.sim.drills.yard import Yard

KEYS = [b"key%02d" % number for number in range(12)]
ROUNDS = 150

Model = dict[bytes, bytes]


class _Party:
    """One of two transactions that are under way at the same time."""

    def __init__(self, yard: Yard, transaction: OptimisticTransaction, model: Model) -> None:
        self._yard = yard
        self._model = model
        self.transaction = transaction
        self.read: list[tuple[bytes, bytes]] = []
        """Ranges of keys, the end excluded."""
        self.own: dict[bytes, bytes | None] = {}

    async def step(self, value: bytes) -> None:
        """Read a key or a range, or write."""
        low, high = sorted(self._yard.rng.sample(KEYS, 2))
        match self._yard.rng.randrange(4):
            case 0:
                await self._get(low)
            case 1:
                await self._range(low, high)
            case 2:
                self.own[low] = value
                self.transaction.put(low, value)
            case _:
                self.own[low] = None
                self.transaction.delete(low)

    async def _get(self, key: bytes) -> None:
        found = await self.transaction.get(key)
        if found != (self.own[key] if key in self.own else self._model.get(key)):
            self._yard.wrong("a transaction reads something else than what was there, or what it has written")
        if key not in self.own:
            self.read.append((key, key + b"\0"))

    async def _range(self, low: bytes, high: bytes) -> None:
        limit, reverse = self._yard.rng.choice([1, 3, 100]), self._yard.rng.random() < 0.3
        found = await self.transaction.range(low, high, limit=limit, reverse=reverse)
        seen = {**self._model, **self.own}
        pairs = [(key, value) for key, value in seen.items() if low <= key < high and value is not None]
        wanted = sorted(pairs, reverse=reverse)[:limit]
        if found != wanted:
            self._yard.wrong(f"a range of {len(wanted)} keys was read as {len(found)} other ones")
        if len(found) == limit:
            # What lies behind was not looked at.
            low, high = (found[-1][0], high) if reverse else (low, found[-1][0] + b"\0")
        self.read.append((low, high))

    def has_read(self, keys: set[bytes]) -> bool:
        """Whether it depends on any of these."""
        return any(begin <= key < end for begin, end in self.read for key in keys)

    def apply(self) -> None:
        """It was committed."""
        for key, value in self.own.items():
            if value is None:
                self._model.pop(key, None)
            else:
                self._model[key] = value


async def transactions_are_serial(yard: Yard) -> None:
    """Two at a time on an engine of its own: the second must not commit what rests on what the first has changed."""
    engine = await MemoryEngine.open()
    model: Model = {}
    for turn in range(ROUNDS):
        parties = [_Party(yard, engine.begin(), model) for _ in range(2)]
        try:
            for step in range(yard.rng.randrange(1, 5)):
                for number, party in enumerate(parties):
                    await party.step(b"%d.%d.%d" % (turn, step, number))
        except Conflict:
            yard.wrong("a transaction conflicts though nothing was committed since it began")
        written: set[bytes] = set()
        for party in parties:
            try:
                await engine.commit(party.transaction)
            except MendfsError:
                continue
            if party.own and party.has_read(written):
                yard.wrong("a transaction was committed though what it had read was changed meanwhile")
                return
            party.apply()
            written |= party.own.keys()
    if dict(engine.read_range(b"a", b"z", 1000, False)) != model:
        yard.wrong("the engine holds something else than what was committed")
