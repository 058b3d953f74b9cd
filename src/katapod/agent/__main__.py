"""`python -m katapod.agent`: the agent as a program other than init, for example on a host in tests."""

from katapod.agent.main import main

main()
