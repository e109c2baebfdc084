"""Every request and answer of the protocol, one frozen struct each, in three pages: session, meta, data.

Messages are MessagePack maps tagged with their name; unknown fields are refused. `Message` is the union of all of
them, which the one decoder in `wire.frame` is built from. A raw payload (a block's bytes) travels beside a message and
never goes through the codec.
"""

from mendfs.wire.messages import data, meta, session

Message = session.SessionMessage | meta.MetaMessage | data.DataMessage
