"""Formulas of a denoising step: noise grids, samplers, the Gaussian of a step. No diffusers."""
