"""Many runs: what to vary, where they are trained, and what became of each."""
