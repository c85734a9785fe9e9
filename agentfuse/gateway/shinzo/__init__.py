"""Shinzo Filesystem, ``/v1/agent/{agentId}/filesystem``: an agent's files, by paths whose first name is a
region's.
"""
