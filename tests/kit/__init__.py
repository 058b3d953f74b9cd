"""What the tests on real VMs share: running kata-runtime, terminals, leak probes, a Debian root file system."""
