"""The kernel's end of a mount: requests come in through two buffers, answers go out, notifications have a thread.

A request is read into [80 bytes, 1 MiB]: a WRITE's data then lies alone in the second buffer and is used from there
without a copy. Several requests are read for one wake-up of the event loop, since the wake-up costs more than they do.
"""

import asyncio
import errno
import mmap
import os
import queue
import threading
from collections.abc import Callable

import structlog

from mendfs.fuse import protocol_replies
from mendfs.fuse.constants import MAX_WRITE
from mendfs.fuse.protocol_requests import HEAD_BYTES, HEADER_BYTES

log = structlog.get_logger("mendfs.fuse")

REQUESTS_PER_WAKE_MAX = 64
"""Then the loop turns to its connections: a flood of requests must not keep their answers waiting."""
NOTIFICATIONS_MAX = 100_000
"""Waiting invalidations; beyond it they are refused, and the caller must fall back to what is always right."""
SPARE_PAYLOADS_MAX = 16
"""Buffers of writes that waited, kept for the next ones: 16 MiB."""
NOTIFIER_STOP_S = 5.0

_GONE = {errno.ENODEV, errno.ECONNABORTED, errno.ENOTCONN, errno.EBADF}


def _aligned_buffer() -> memoryview:
    """A buffer that begins with a page: measured, the kernel then copies 1 MiB in 0.2 ms instead of 0.55 ms."""
    return memoryview(mmap.mmap(-1, MAX_WRITE))


class Channel:
    """Reads requests from the device and writes answers to it. Owns the descriptor. For the event loop's thread."""

    def __init__(self, fd: int, receive: Callable[[int], None]) -> None:
        self.head = bytearray(HEAD_BYTES)
        self.payload = _aligned_buffer()
        self.ended: asyncio.Event = asyncio.Event()
        """The kernel has taken the mount away, or `close` was called: nothing more is read."""
        self._fd = fd
        self._receive = receive
        self._spare_payloads: list[memoryview] = []
        self._buffers: list[bytearray | memoryview] = [self.head, self.payload]
        self._loop = asyncio.get_running_loop()
        self._is_reading = False
        self._is_closed = False
        self._notifier: _Notifier | None = None

    # --- requests ---------------------------------------------------------------------------------------------

    def resume(self) -> None:
        """Read requests from now on."""
        if not self._is_reading and not self.ended.is_set():
            self._is_reading = True
            self._loop.add_reader(self._fd, self._on_readable)

    def pause(self) -> None:
        """Leave requests with the kernel until `resume`."""
        if self._is_reading:
            self._is_reading = False
            self._loop.remove_reader(self._fd)

    def _on_readable(self) -> None:
        fd, buffers = self._fd, self._buffers
        for _ in range(REQUESTS_PER_WAKE_MAX):
            try:
                length = os.readv(fd, buffers)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in (errno.ENOENT, errno.EINTR):
                    continue  # The request was given up while it was being handed over.
                self._end(error)
                return
            self._receive(length)
            if not self._is_reading:
                return

    def _end(self, error: OSError) -> None:
        self.pause()
        if error.errno not in _GONE:
            log.error("reading the FUSE device failed, the mount ends", error=error.strerror)
        self.ended.set()

    def body(self, length: int) -> bytes:
        """The body of the request that was just read, all `length` bytes of it."""
        if length <= HEAD_BYTES:
            return bytes(memoryview(self.head)[HEADER_BYTES:length])
        return b"".join((memoryview(self.head)[HEADER_BYTES:], self.payload[: length - HEAD_BYTES]))

    def detach_payload(self) -> memoryview:
        """Keep the data of the WRITE that was just read, until `give_payload`; the next one gets another buffer."""
        detached = self.payload
        self.payload = self._buffers[1] = self._spare_payloads.pop() if self._spare_payloads else _aligned_buffer()
        return detached

    def give_payload(self, payload: memoryview) -> None:
        """Nobody uses the detached buffer any more."""
        if len(self._spare_payloads) < SPARE_PAYLOADS_MAX:
            self._spare_payloads.append(payload)

    # --- answers ----------------------------------------------------------------------------------------------

    def answer(self, unique: int, body: bytes | memoryview) -> None:
        """The request succeeded."""
        header = protocol_replies.answer_header(unique, len(body))
        self._write((header, body) if body else (header,), unique)

    def fail(self, unique: int, code: int) -> None:
        """The request failed with this errno."""
        self._write((protocol_replies.failure(unique, code),), unique)

    def _write(self, parts: tuple[bytes | memoryview, ...], unique: int) -> None:
        if self._is_closed:
            return
        try:
            os.writev(self._fd, parts)
        except OSError as error:
            # ENOENT: nobody waits for this answer any more. Not connected: the mount is gone, and with it the asker.
            if error.errno != errno.ENOENT and error.errno not in _GONE:
                log.error("the kernel refused an answer", request=unique, error=error.strerror)
                if parts[1:]:
                    # Without any answer the application would wait for ever.
                    self._write((protocol_replies.failure(unique, errno.EIO),), unique)

    # --- notifications ----------------------------------------------------------------------------------------

    def notify(self, notification: bytes) -> bool:
        """Send an invalidation from a thread of its own: the kernel may make it wait for a lock that a request holds.

        False: too many wait already.
        """
        if self._is_closed:
            return True
        if self._notifier is None:
            self._notifier = _Notifier(self._fd)
            self._notifier.start()
        return self._notifier.put(notification)

    async def close(self) -> None:
        """Close the device: whoever still waits for an answer gets ECONNABORTED."""
        if self._is_closed:
            return
        self._is_closed = True
        self.pause()
        self.ended.set()
        notifier = self._notifier
        if notifier is not None:
            # Before the descriptor is closed: its number may be given to another file at once. Not for ever: it may
            # wait for a lock that only the closing sets free.
            notifier.stop()
            await asyncio.to_thread(notifier.join, NOTIFIER_STOP_S)
        os.close(self._fd)


class _Notifier(threading.Thread):
    """Writes notifications one after the other."""

    def __init__(self, fd: int) -> None:
        super().__init__(name="fuse-notify", daemon=True)
        self._fd = fd
        self._waiting: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()

    def put(self, notification: bytes) -> bool:
        if self._waiting.qsize() >= NOTIFICATIONS_MAX:
            return False
        self._waiting.put(notification)
        return True

    def stop(self) -> None:
        self._waiting.put(None)

    def run(self) -> None:
        while (notification := self._waiting.get()) is not None:
            try:
                os.write(self._fd, notification)
            except OSError as error:
                # ENOENT: the kernel has nothing cached of it.
                if error.errno != errno.ENOENT and error.errno not in _GONE:
                    log.warning("the kernel refused a notification", error=error.strerror)
