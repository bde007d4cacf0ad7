"""Processes that train together: who does what, how tensors are split and summed, how a signal stops them."""
