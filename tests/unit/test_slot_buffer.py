"""Slot buffers against a plain bytearray: whatever is written in whatever order, the same bytes come out."""

from hypothesis import given
from hypothesis import strategies as st

from mendfs.client import slot_buffer
from mendfs.client.slot_buffer import SlotBuffer
from mendfs.model import KiB, MiB, Slot
from mendfs.world.buffers import BufferPool

SIZE = 64
Write = tuple[int, bytes]


@st.composite
def writes(draw: st.DrawFn) -> list[Write]:
    result = []
    for _ in range(draw(st.integers(1, 12))):
        offset = draw(st.integers(0, SIZE - 1))
        result.append((offset, draw(st.binary(min_size=1, max_size=SIZE - offset))))
    return result


def check_against(buffer: SlotBuffer, model: dict[int, int], size: int) -> None:
    held: dict[int, int] = {}
    before = -1
    for offset, data in buffer.pieces():
        assert offset >= before, "pieces are sorted and disjoint"
        before = offset + len(data)
        held.update(enumerate(data, start=offset))
    assert held == model
    assert buffer.covered == len(model)
    assert buffer.is_full == (len(model) == size)
    assert buffer.end == (max(model) + 1 if model else 0)
    assert buffer.is_empty == (not model)


@given(writes(), st.integers(0, SIZE), st.integers(0, SIZE), st.booleans())
def test_what_was_written_last_is_what_is_held(done: list[Write], clip: int, begin: int, pooled: bool) -> None:
    buffer = SlotBuffer(Slot(0), SIZE, BufferPool())
    from_bytes, above = slot_buffer.POOLED_FROM_BYTES, slot_buffer.POOLED_ABOVE_BYTES
    try:
        if pooled:
            slot_buffer.POOLED_FROM_BYTES, slot_buffer.POOLED_ABOVE_BYTES = 8, 16
        model: dict[int, int] = {}
        for offset, data in done:
            buffer.write(memoryview(data), offset)
            model.update(enumerate(data, start=offset))
            check_against(buffer, model, SIZE)
        check_copy(buffer, model, begin)
        buffer.clip(clip)
        model = {at: value for at, value in model.items() if at < clip}
        check_against(buffer, model, SIZE)
        # A clipped buffer goes on being written to.
        for offset, data in done:
            buffer.write(memoryview(data), offset)
            model.update(enumerate(data, start=offset))
        check_against(buffer, model, SIZE)
        check_cost(buffer)
    finally:
        slot_buffer.POOLED_FROM_BYTES, slot_buffer.POOLED_ABOVE_BYTES = from_bytes, above


def check_copy(buffer: SlotBuffer, model: dict[int, int], begin: int) -> None:
    target = bytearray(b"\xee" * (SIZE - begin))
    gaps = buffer.copy_into(memoryview(target), begin, SIZE)
    missing = {at for lower, upper in gaps for at in range(lower, upper)}
    assert missing == {at for at in range(begin, SIZE) if at not in model}
    for at in range(begin, SIZE):
        assert target[at - begin] == (0xEE if at in missing else model[at])


def check_cost(buffer: SlotBuffer) -> None:
    """What is counted is given back whole when nothing is held any more."""
    buffer.clip(0)
    assert buffer.cost == slot_buffer.OVERHEAD_BYTES


def test_a_sequential_writer_has_one_piece_in_pooled_memory() -> None:
    pool = BufferPool()
    buffer = SlotBuffer(Slot(0), 4 * MiB, pool)
    for at in range(0, 4 * MiB, 4 * KiB):
        buffer.write(memoryview(bytes([at >> 12 & 255]) * 4096), at)
    assert buffer.is_full
    ((offset, data),) = buffer.pieces()
    assert offset == 0 and len(data) == 4 * MiB
    assert data[5 << 12] == 5
    del data
    buffer.release(reuse=True)
    assert pool.kept_bytes == 4 * MiB


def test_memory_that_may_still_be_on_its_way_is_not_used_again() -> None:
    pool = BufferPool()
    buffer = SlotBuffer(Slot(0), MiB, pool)
    buffer.write(memoryview(bytes(MiB)), 0)
    buffer.release(reuse=False)
    assert pool.kept_bytes == 0
