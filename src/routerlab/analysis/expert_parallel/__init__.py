"""What expert parallelism would cost: computed from loads and a cost model, without devices."""
