"""`python -m katapod.agent`: the agent off the guest's init, for instance on a host for tests."""

from katapod.agent.main import main

main()
