"""Many runs of one configuration: `ddpo sweep`, and what `ddpo pareto --sweep` trains."""
