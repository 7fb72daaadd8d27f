"""Recorded routings and finished runs, read from files."""
