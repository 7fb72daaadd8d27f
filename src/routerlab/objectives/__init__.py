"""LightningModules: a task, and the routing that serves it."""
