"""mendfs: a fault-tolerant distributed file system that people mount like a disk.

The map, lowest layer first. A package imports only from layers above it in this list (tests/unit/test_layers.py):

    model       ids, extents, attributes, the volume: frozen values
    errors      every error raised on purpose, classed by what the caller does next
    blocks      page checksums and root of a block
    extents     newer extents over older ones, clipping by cuts, the plan of a read
    merging     which slots are crowded, and what is rewritten of them
    placement   which servers hold which partition
    world       the only seam to the operating system: network, disk, processes, clock, rng
    wire        frames, messages, connections
    kv          ordered keys with optimistic transactions: the engine under all metadata and indexes
    transfer    pages of a block from any of its replicas, verified
    data        data server: segments, index, inventory
    meta        meta server: namespace, sessions, commit, freeing, members
    client      the volume as a library: sessions, writing, reading
    promises    what must hold of stored metadata, as checks
    fuse        the kernel's FUSE protocol, and the volume behind it
    cluster     what runs on one machine: children, supervisor, the folder it is written down in
    sim         a whole cluster in one process, on simulated time, network and disks
    cli         the command line

Data flows one way: application -> fuse -> client -> (wire) -> meta -> kv for names, -> (wire) -> data -> world for
bytes. docs/README.md gives a reading order.
"""

__version__ = "0.1.0"
