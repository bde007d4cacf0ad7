"""Diffusions whose laws are known exactly: denoising chains on Gaussian and mixture data, time reversal, Girsanov."""
