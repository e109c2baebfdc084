"""The wire (design section 8): frames, the messages in them, and the connections that carry them."""
