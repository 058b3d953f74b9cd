"""The back end MachineConfig: OpenShift's machine-config operator puts the runtime on nodes, pool by pool.

names    of objects, labels and annotations, as OpenShift has them
views    what is looked at of MachineConfigs, pools, ... , parsed where it comes in
backend  pure: which back end a KataConfig has, and what speaks against it
pools    pure: which pool takes the runtime, which pool a node is in, which nodes are chosen
nodes    pure: what to do about one node
objects  what is made, as the API server takes it
plan     pure: from what is there to what is to be done, and the situation
"""
