"""The meta server: namespace, sessions, commits, freeing and members, as functions over transactions."""
