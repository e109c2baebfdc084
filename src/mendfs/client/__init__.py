"""The volume as a library: sessions, writing and reading. It knows nothing of FUSE."""
