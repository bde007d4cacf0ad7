"""Control theory: problems with exact solutions, solvers, and the checks that `ddpo verify` runs.

Imported on its own (`import ddpo.control`); `import ddpo` does not need it.
"""
