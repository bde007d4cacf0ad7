"""Figures of the checks: what was computed, drawn over what is exact.

Each function computes its data with a fixed seed and returns a `matplotlib.figure.Figure` that belongs to no window;
`figure.savefig(path)` writes it. matplotlib is imported when a figure is drawn and not before.
"""
