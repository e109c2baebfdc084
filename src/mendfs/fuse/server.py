"""A mounted volume: requests of the kernel -> volume -> answers. Errors become errnos here and nowhere else.

What needs no waiting is answered from the reading loop, since each wake-up costs more than the work; all else runs as
a task that the mount owns. Requests of one file that the kernel sends one after the other stay in that order only as
far as the kernel waits for each answer, which it does for everything but read-ahead and the last release.
"""

import asyncio
import errno
import time
from collections.abc import Callable, Coroutine

import msgspec
import structlog

from mendfs.errors import BadMessage, MendfsError, OperationError
from mendfs.fuse import constants, device, protocol_replies
from mendfs.fuse.channel import Channel
from mendfs.fuse.constants import MAX_WRITE
from mendfs.fuse.directories import Directories
from mendfs.fuse.files import Files, OpenFile
from mendfs.fuse.mount_options import MountFlags
from mendfs.fuse.names import Names
from mendfs.fuse.operations import BY_INODE, immediate_operations, waiting_operations
from mendfs.fuse.protocol_replies import Limits, Replies
from mendfs.fuse.protocol_requests import GetXattr, Header, Init, Interrupt, Release, Write, parse_header
from mendfs.fuse.served import ServedVolume
from mendfs.model import Inode, KiB, MiB
from mendfs.world.buffers import BufferPool

log = structlog.get_logger("mendfs.fuse")

INIT_TIMEOUT_S = 10.0
"""The kernel sends INIT with the mount; more means that something is very wrong."""
ERRNO_MAX = 511
"""The kernel refuses an answer with a higher one."""
CANCEL_TIMEOUT_S = 5.0
"""For requests that are given up at the end of a mount to notice it."""
WAITING_WRITE_BYTES_MAX = 128 * MiB
"""Data of writes that wait for the volume. Beyond it requests stay with the kernel until some are done: a hundred
threads that write while no server answers must not fill the memory."""
COPIED_BYTES_MAX = 64 * KiB
"""The data of a write that must wait is copied up to this size; a bigger one keeps the buffer it was read into."""


class MountOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How a volume is served to the kernel."""

    flags: MountFlags = MountFlags()
    entry_timeout_s: float = 0
    """How long the kernel may believe a name without asking. 0 until leases exist: other mounts change names too."""
    attribute_timeout_s: float = 0
    """How long it may believe attributes. 0: measured, 1 s already breaks close-to-open."""
    walk_timeout_s: float = 0.02
    """How long it may believe those of directories, and those that came with the lookup of a name. This spares more
    than half of all requests (a stat takes one instead of three, an open two instead of four), for the kernel asks
    again for what it has just looked up. Names are still looked up each time, so an open by name sees the size as it
    is; a descriptor may see a size that is this old, if its file was looked up here less than this ago."""
    read_ahead_bytes: int = 4 * MiB
    """How far the kernel reads ahead of a sequential reader: the next block comes while this one is used."""
    background_requests: int = 64
    """Read-ahead requests the kernel may have open: 64 MiB of buffers at worst."""
    with_readdirplus: bool = False
    """Listings carry attributes. Worth nothing while names are looked up each time: measured, each is looked up all the
    same and the listing only costs more. For the leases to come."""
    interrupt_after_s: float = 0.5
    """A request whose caller got a signal ends with EINTR when it is not done by then. Not at once: programs whose
    runtime sends them signals all the time (Go's does) would see failures of calls that are merely under way."""


class Mount:
    """A volume mounted at a path, from `serve_mount` on. It owns the volume: `unmount` closes it."""

    def __init__(self, volume: ServedVolume, options: MountOptions, now_ns: Callable[[], int]) -> None:
        self.mountpoint = ""
        self._volume = volume
        self._options = options
        replies = Replies(
            block_size=volume.parameters.block_size,
            entry_timeout_s=options.entry_timeout_s,
            attribute_timeout_s=options.attribute_timeout_s,
            walk_timeout_s=options.walk_timeout_s,
        )
        self._files = Files(volume, replies, BufferPool())
        self._names = Names(volume, replies, now_ns, self._files.mode_changed)
        self._directories = Directories(volume, replies, self._files.is_open)
        self._tasks: set[asyncio.Task[None]] = set()
        self._running: dict[int, asyncio.Task[None]] = {}
        """Requests that can be interrupted, by their number."""
        self._waiting_write_bytes = 0
        self._loop = asyncio.get_running_loop()
        self._is_initialised = self._loop.create_future()
        self._channel: Channel

    # --- life -------------------------------------------------------------------------------------------------

    async def start(self, path: str) -> None:
        """Mount and answer INIT. Raises UsageError."""
        flags = self._options.flags
        self.mountpoint = await asyncio.to_thread(device.check_mountpoint, path, allow_nonempty=flags.allow_nonempty)
        fd = await asyncio.to_thread(device.mount, self.mountpoint, flags)
        self._channel = Channel(fd, self._receive)
        self._waiting = waiting_operations(self._names, self._files, self._directories, self._channel)
        self._immediate = immediate_operations(self._directories)
        self._channel.resume()
        try:
            async with asyncio.timeout(INIT_TIMEOUT_S):
                await self._is_initialised
        except BaseException:
            await asyncio.to_thread(self._take_away)
            await self._channel.close()
            raise
        device.set_io_flusher()
        await asyncio.to_thread(device.raise_read_ahead, self.mountpoint, self._options.read_ahead_bytes)

    async def wait(self) -> None:
        """Until somebody has unmounted it; then call `unmount` for the rest."""
        await self._channel.ended.wait()

    async def unmount(self, timeout_s: float = 30.0) -> tuple[str, ...]:
        """Take the mount away, flush, close the volume. Returns a line for each thing that was not flushed in time."""
        deadline = self._loop.time() + timeout_s
        taking_away = asyncio.ensure_future(asyncio.to_thread(self._take_away))
        await asyncio.wait({taking_away}, timeout=timeout_s)
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=max(deadline - self._loop.time(), 0))
        troubles = [f"{len(self._tasks)} requests were not answered in {timeout_s:g} s"] if self._tasks else []
        await self._cancel_tasks()
        await self._channel.close()
        # Closing the device ended whatever the kernel still waited for.
        await taking_away
        await self._files.release_all()
        troubles += await self._volume.close(max(deadline - self._loop.time(), 1.0))
        return tuple(troubles)

    def invalidate_inode(self, inode: Inode) -> bool:
        """Let the kernel forget the inode's attributes and pages. False: it is behind, call again later."""
        return self._channel.notify(protocol_replies.invalidate_inode(inode, offset=0, length=0))

    def invalidate_entry(self, parent: Inode, name: bytes) -> bool:
        """Let the kernel forget a name. False: it is behind, call again later."""
        return self._channel.notify(protocol_replies.invalidate_entry(parent, name))

    async def _cancel_tasks(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=CANCEL_TIMEOUT_S)

    def _take_away(self) -> None:
        """Blocks: the kernel writes back what mappings have changed, and we answer it meanwhile."""
        if self._channel.ended.is_set():
            return
        try:
            device.unmount(self.mountpoint)
        except OperationError as error:
            if error.errno == errno.EINVAL:
                return  # Somebody else was faster.
            # Files are open below it, or somebody stands there. The name goes now; what they wrote is flushed.
            log.warning("the mount is in use: taken away while files are open", mountpoint=self.mountpoint)
            device.unmount(self.mountpoint, detach=True)

    # --- requests ---------------------------------------------------------------------------------------------

    def _receive(self, length: int) -> None:
        """One request lies in the channel's buffers."""
        channel = self._channel
        try:
            header = parse_header(channel.head, length)
        except BadMessage as error:
            log.error("a request without a readable header: it cannot even be refused", error=str(error))
            return
        try:
            if header.operation == constants.WRITE:
                self._write(header, Write.parse_head(channel.head, length))
            else:
                self._dispatch(header, channel.body(length))
        except MendfsError as error:
            self._fail(header, error)

    def _dispatch(self, header: Header, body: bytes) -> None:
        operation = header.operation
        waiting = self._waiting.get(operation)
        if waiting is not None:
            if operation == constants.GETXATTR and (known := self._names.known_xattr(GetXattr.parse(body))) is not None:
                self._channel.fail(header.unique, known)
                return
            self._start(header, waiting(header, body))
            return
        immediate = self._immediate.get(operation)
        if immediate is not None:
            self._channel.answer(header.unique, immediate(header, body))
        elif operation == constants.RELEASE:
            # The application does not wait for it, so neither does the kernel's memory of the request.
            self._channel.answer(header.unique, b"")
            self._release(self._files.remove(Release.parse(body)))
        elif operation == constants.INTERRUPT:
            self._interrupt(Interrupt.parse(body).unique)
        elif operation == constants.INIT:
            self._init(header, Init.parse(body))
        elif operation not in (constants.FORGET, constants.BATCH_FORGET):
            self._channel.fail(header.unique, errno.ENOSYS)

    def _init(self, header: Header, request: Init) -> None:
        if (request.major, request.minor) < (constants.PROTOCOL_MAJOR, constants.PROTOCOL_MINOR_MIN):
            self._channel.fail(header.unique, errno.EPROTO)
            message = f"the kernel speaks FUSE {request.major}.{request.minor}: mendfs needs Linux 5.17 or newer"
            if not self._is_initialised.done():
                self._is_initialised.set_exception(MendfsError(message))
            return
        limits = Limits(
            read_ahead_bytes=self._options.read_ahead_bytes,
            background_requests=self._options.background_requests,
            with_readdirplus=self._options.with_readdirplus,
        )
        self._channel.answer(header.unique, protocol_replies.init(request, limits))
        if request.major == constants.PROTOCOL_MAJOR and not self._is_initialised.done():
            self._is_initialised.set_result(None)

    def _write(self, header: Header, request: Write) -> None:
        """No await between the read of the request and try_write: the data lies in the buffer of the next request."""
        channel = self._channel
        data = channel.payload[: request.size]
        if self._files.try_write(request, data):
            channel.answer(header.unique, protocol_replies.written(request.size))
            return
        if request.size <= COPIED_BYTES_MAX:
            self._start(header, self._files.write(request, memoryview(bytes(data))))
            return
        self._waiting_write_bytes += MAX_WRITE
        if self._waiting_write_bytes >= WAITING_WRITE_BYTES_MAX:
            channel.pause()
        self._start(header, self._write_detached(request, channel.detach_payload()))

    async def _write_detached(self, request: Write, payload: memoryview) -> bytes:
        try:
            answer = await self._files.write(request, payload[: request.size])
            self._channel.give_payload(payload)
            return answer
        finally:
            self._waiting_write_bytes -= MAX_WRITE
            if self._waiting_write_bytes < WAITING_WRITE_BYTES_MAX:
                self._channel.resume()

    def _release(self, file: OpenFile) -> None:
        task = self._loop.create_task(file.release())
        self._tasks.add(task)
        task.add_done_callback(self._released)

    def _released(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("releasing a file failed", error=str(error), exc_info=None if _is_ours(error) else error)

    def _interrupt(self, unique: int) -> None:
        task = self._running.get(unique)
        if task is not None:
            self._loop.call_later(self._options.interrupt_after_s, task.cancel)

    # --- tasks ------------------------------------------------------------------------------------------------

    def _start(self, header: Header, work: Coroutine[None, None, bytes | None]) -> None:
        """Answer the request when `work` is done."""
        task = self._loop.create_task(self._answer(header, work))
        self._tasks.add(task)
        self._running[header.unique] = task
        task.add_done_callback(lambda done: self._finished(done, header))

    async def _answer(self, header: Header, work: Coroutine[None, None, bytes | None]) -> None:
        try:
            body = await work
        except MendfsError as error:
            self._fail(header, error)
        else:
            if body is not None:
                self._channel.answer(header.unique, body)

    def _finished(self, task: asyncio.Task[None], header: Header) -> None:
        self._tasks.discard(task)
        del self._running[header.unique]
        if task.cancelled():
            self._channel.fail(header.unique, errno.EINTR)
        elif (error := task.exception()) is not None:
            # Our mistake. The application must not wait for ever for it.
            log.error("a request failed in an unforeseen way", operation=header.operation, exc_info=error)
            self._channel.fail(header.unique, errno.EIO)

    def _fail(self, header: Header, error: MendfsError) -> None:
        code = error.errno
        if isinstance(error, OperationError):
            if code == errno.ENOENT and header.operation in BY_INODE:
                code = errno.ESTALE
        else:
            log.warning("a request failed", operation=header.operation, inode=header.node, error=str(error))
            if code == errno.EAGAIN:
                # On a regular file EAGAIN means nothing to an application.
                code = errno.EIO
        self._channel.fail(header.unique, code if 0 < code <= ERRNO_MAX else errno.EIO)


def _is_ours(error: BaseException) -> bool:
    return isinstance(error, MendfsError)


async def serve_mount(
    volume: ServedVolume,
    mountpoint: str,
    options: MountOptions | None = None,
    *,
    now_ns: Callable[[], int] = time.time_ns,
) -> Mount:
    """Mount `volume` at `mountpoint` and serve it from this event loop. Raises UsageError; `volume` is then not closed.

    Nothing in this thread may touch a path below the mount point from now on: it would wait for itself.
    """
    mount = Mount(volume, options or MountOptions(), now_ns)
    await mount.start(mountpoint)
    return mount
