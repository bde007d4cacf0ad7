"""One page about runs, `ddpo report`: what was run, how it went, what it made, and what the doctor says."""
