"""The default engine: RocksDB in the process, its log written at each commit and synced by groups.

Measured: 6 us for a batch whose log reaches the page cache (which survives kill -9), 1 us a read, about 200 us a sync.
This is one of the two modules outside `world` that touch the disk: RocksDB brings its own file system code.
"""

import asyncio
import os
from concurrent.futures import ThreadPoolExecutor

from rocksdict import BlockBasedOptions, Cache, DBRecoveryMode, Options, Rdict, ReadOptions, WriteBatch, WriteOptions

from mendfs.errors import EngineDamaged, EngineFailed, EngineFull, EngineUnreadable, MendfsError
from mendfs.kv import rocks_files
from mendfs.kv.optimistic import SEQUENCE_KEY, OptimisticEngine, Pairs, Writes
from mendfs.kv.rocks_files import SEQUENCE, Mark
from mendfs.model import KiB, MiB

_BLOOM_BITS_PER_KEY = 10
_OPEN_FILES_MAX = 128
"""Tables of 64 MiB: enough for 8 GiB of metadata; more are opened and closed as needed."""


class RocksEngine(OptimisticEngine):
    """See `kv.engine.Engine`. One process at a time may have the folder open."""

    def __init__(self, path: str, database: Rdict, mark: Mark, last_sequence: int) -> None:
        super().__init__(last_sequence)
        self._path = path
        self._database = database
        self._mark = mark
        self._get = database.get
        self._options = WriteOptions()
        # One thread: there is never more than one sync under way, and flush_wal lets the interpreter go on.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="rocks")

    @classmethod
    async def open(
        cls,
        path: str,
        *,
        cache_bytes: int = 32 * MiB,
        write_buffer_bytes: int = 16 * MiB,
        may_create: bool = True,
    ) -> "RocksEngine":
        """Open the database in the folder `path`, made if missing unless told otherwise.

        Raises UsageError if it is in use, StoreDamaged, and EngineFailed for what may pass: a full disk, say.
        """
        loop = asyncio.get_running_loop()
        return cls(path, *await loop.run_in_executor(None, _open, path, cache_bytes, write_buffer_bytes, may_create))

    def read(self, key: bytes) -> bytes | None:
        """The committed value."""
        try:
            value: bytes | None = self._get(key)
        except Exception as error:  # rocksdict raises no narrower class
            raise self._unreadable(error) from None
        return value

    def read_range(self, begin: bytes, end: bytes, limit: int, reverse: bool) -> Pairs:
        """Up to `limit` committed pairs with begin <= key < end."""
        # The bounds are set for RocksDB too: else it would walk over whatever was deleted beyond them (a freed queue
        # can leave 100,000 tombstones) to find a pair that nobody asked for. The lower one cannot be (rocksdict 0.3.29
        # sets the upper bound when asked for the lower one), so that end is compared here.
        bounds = ReadOptions()
        bounds.set_iterate_upper_bound(end)
        pairs: Pairs = []
        try:
            # The iterator is a snapshot and pins memory, so it does not outlive this call.
            found = self._database.iter(bounds)
            step = found.prev if reverse else found.next
            if reverse:
                found.seek_to_last()
            else:
                found.seek(begin)
            while len(pairs) < limit and found.valid():
                key: bytes = found.key()
                if key < begin:
                    break
                pairs.append((key, found.value()))
                step()
            if len(pairs) < limit:
                # An iterator that meets a damaged block just ends: only this tells a short range from a lost one.
                found.status()
        except Exception as error:  # rocksdict raises no narrower class
            raise self._unreadable(error) from None
        return pairs

    def write(self, writes: Writes, sequence: int) -> None:
        """Apply at once, with `sequence` under SEQUENCE_KEY. Raises EngineFailed when the log cannot take it."""
        batch = WriteBatch(raw_mode=True)
        for key, value in writes.items():
            if value is None:
                batch.delete(key)
            else:
                batch.put(key, value)
        # The last one in the batch: rocks_files finds it there.
        batch.put(SEQUENCE_KEY, SEQUENCE.pack(sequence))
        try:
            self._database.write(batch, self._options)
        except Exception as error:  # rocksdict raises no narrower class
            raise self._failed("cannot be written", error) from None

    async def sync_log(self) -> None:
        """One flush_wal with sync, in the thread, and the mark after it."""
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._thread, self._flush, self._last, loop.time())

    async def release(self) -> None:
        """Close the database, which writes its tables. Raises EngineFailed; what was synced is in the log."""
        try:
            await asyncio.get_running_loop().run_in_executor(self._thread, self._close)
        finally:
            self._thread.shutdown()

    def _close(self) -> None:
        try:
            try:
                self._database.close()
            finally:
                self._mark.close()
        except Exception as error:  # rocksdict raises no narrower class
            # It is still open then, and locked. What ends it is that nobody holds it any more: whoever made room on its
            # disk opens the folder again in this process.
            failed = self._failed("cannot be closed", error)
            del self._database, self._get, error
            raise failed from None

    def _flush(self, sequence: int, at_s: float) -> None:
        try:
            self._database.flush_wal(True)
            self._mark.write(sequence, at_s)
        except Exception as error:  # rocksdict raises no narrower class
            raise self._failed("cannot be synced", error) from None

    def _failed(self, what: str, error: Exception) -> EngineFailed:
        text = rocks_files.one_line(error)
        kind = EngineFull if rocks_files.is_full(text) else EngineFailed
        return kind(f"the database in {self._path} {what}: {rocks_files.remedy(text)}")

    def _unreadable(self, error: Exception) -> EngineUnreadable:
        text = rocks_files.one_line(error)
        kind = EngineDamaged if rocks_files.is_damage(text) else EngineUnreadable
        return kind(f"the database in {self._path} cannot be read: {rocks_files.remedy(text)}")


def _options(cache_bytes: int, write_buffer_bytes: int) -> Options:
    tables = BlockBasedOptions()
    tables.set_block_cache(Cache(cache_bytes))
    tables.set_bloom_filter(_BLOOM_BITS_PER_KEY, False)
    tables.set_block_size(8 * KiB)
    # Filters and indexes count against the cache: memory stays what was asked for however many keys there are.
    tables.set_cache_index_and_filter_blocks(True)
    tables.set_pin_l0_filter_and_index_blocks_in_cache(True)
    options = Options(raw_mode=True)
    options.create_if_missing(True)
    options.set_block_based_table_factory(tables)
    options.set_write_buffer_size(write_buffer_bytes)
    options.set_max_write_buffer_number(2)
    options.set_max_background_jobs(2)
    options.set_max_open_files(_OPEN_FILES_MAX)
    options.set_max_log_file_size(1 * MiB)
    options.set_keep_log_file_num(2)
    options.set_stats_dump_period_sec(0)
    options.set_stats_persist_period_sec(0)
    options.set_skip_stats_update_on_db_open(True)
    # Point in time: after a power cut pages of the unsynced log may be there out of order, with a hole in the middle.
    # The mode that tolerates only a corrupted tail refuses to open then, and a store that does not open after a power
    # cut mends nothing. What was synced lies before any such hole.
    options.set_wal_recovery_mode(DBRecoveryMode.point_in_time())
    return options


def _open(path: str, cache_bytes: int, write_buffer_bytes: int, may_create: bool) -> tuple[Rdict, Mark, int]:
    try:
        if not may_create and not os.path.exists(os.path.join(path, "CURRENT")):
            raise rocks_files.damaged(path, "is gone" if not os.path.exists(path) else "has lost its file CURRENT")
        if not os.path.exists(path):
            os.makedirs(path, mode=0o700)
            rocks_files.sync_directory(os.path.dirname(os.path.abspath(path)))
        rocks_files.check(path, _options(cache_bytes, write_buffer_bytes))
        database = Rdict(path, _options(cache_bytes, write_buffer_bytes))
        try:
            raw = database.get(SEQUENCE_KEY)
            sequence: int = SEQUENCE.unpack(raw)[0] if raw else 0
            # What was recovered from the log is in a new, synced table by now.
            return database, Mark.open(path, sequence), sequence
        except BaseException:
            database.close()
            raise
    except MendfsError:
        raise
    except Exception as error:  # OSError, or rocksdict's, which has no narrower class
        raise rocks_files.cannot_open(path, error) from None
