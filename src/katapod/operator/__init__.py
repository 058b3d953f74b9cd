"""Katapod on the nodes of a cluster. So far only the part that changes one node exists: `node/`.

`names` has what a node and a cluster have to agree about, `report` what a node's installation leaves as its outcome.
"""
