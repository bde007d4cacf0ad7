"""Training loops, configuration, state, evaluation, tracking and the command line; imports `ddpo` and `rewards`."""
