"""The cluster's half of the operator: one KataConfig in, nodes with Katapod and RuntimeClasses out.

views       what is looked at of nodes, jobs, pods, ... , parsed where it comes in
decide      pure: from what is there to what is to be done, and the status
objects     what is made, as the API server takes it
machine_config  the same by OpenShift's machine-config operator
client      the one door to the API server, for changes
controller  watches by kopf, decides, has it done
"""
