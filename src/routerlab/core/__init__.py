"""The record, the context and the protocols that every room reads; imports nothing of ours."""
