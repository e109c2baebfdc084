"""A data server: checksummed blocks in append-only segments, an index over them, and what it tells of itself."""
