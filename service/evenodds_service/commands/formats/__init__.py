"""Logs and tables that other tools write, read as outcomes and known rates. `import` and `replay` read through here.

A format is a module with one reader, whose docstring is the mapping. Nothing here knows the service, and nothing loads
a pickle.
"""
