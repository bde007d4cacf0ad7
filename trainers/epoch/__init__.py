"""One epoch: sample, score, credit, update; each file a verb that reads only what it is given."""
