"""Several rewards as one: sums, scales, ranks, schedules."""
