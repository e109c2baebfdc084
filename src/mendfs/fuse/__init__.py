"""The kernel's FUSE protocol, spoken directly on the device, and the volume behind it."""
