"""A reward learnt from preferences: pairs, labelling, the Bradley-Terry fit, calibration, the choice of new pairs.

docs/preferences.md shows the commands; `rewards.preferences.learned` is the reward that comes out.
"""
