"""`ddpo verify`: the exact checks of `ddpo.control`, and the trainer held to an optimum that is known.

Checks that need the training loop live here, the others in `ddpo.control.checks`.
"""
