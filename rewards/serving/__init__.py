"""Rewards in other processes and on other machines: the protocol, its server and its client."""
