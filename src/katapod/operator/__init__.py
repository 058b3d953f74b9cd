"""Katapod on the nodes of a cluster: `cluster/` decides what nodes need, `node/` changes one.

`names` has what a node and a cluster have to agree about, `report` what a node's installation leaves as its outcome.
"""
