"""`make bench`: what Katapod costs, in one run on one machine, beside raw QEMU, crun, runc and gVisor's runsc.

rows.py         pure: samples become rows, with median, spread and ratio
contestants.py  how each runtime is called
workload.py     what all of them run: the root file system, its bundles, its image
crun_view.py    where crun can work
by_hand.py      virtio-fs by hand, that shares are compared with
share.py        pure: what is done on a share, and its rows
containerd.py   a containerd of the benchmark's own, and ctr
pods.py         pods by the CRI, with the tests' containerd
oci.py          Podman, and runtimes by the command line of OCI engines
network.py      a pod's network, by veth alone, by hand and Katapod's
raw_boot.py     the raw boot that starts are compared with
measure.py      starts commands, takes the times of their output and end, leaves nothing behind
pool.py         Katapod's pool: its server, and when it is full
memory.py       proportional set size of a sandbox, by part
setting.py      what a run needs, and its removal
suites.py       what is measured in a round
machine.py      the machine and the versions
table.py, plots.py  the results for people
compare.py      the results beside a baseline
run.py          the command
timeline.py, sandbox_memory.py   other commands: the picture of a trace, memory of many idle sandboxes

Nothing here decides a test: timings are reported, never asserted.
"""
