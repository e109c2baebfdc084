"""Ordered keys with optimistic transactions: one interface, several engines, one conformance suite."""
