"""Replays: drive a running service through recorded success rates and compare predictors on the same outcomes.

A replay is a client like any other: it knows the wire contract and nothing of the service's insides.
"""
