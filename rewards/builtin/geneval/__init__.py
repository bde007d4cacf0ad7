"""GenEval (Ghosh et al. 2023, arXiv:2310.11513): does a picture show the objects, counts, colours, positions asked?

`spec` reads the official metadata, `rules` decides on detected objects, `detector` finds them, `colors` names their
colours, `reward` puts these together.
"""
