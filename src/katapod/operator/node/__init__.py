"""What puts Katapod on one node and takes it away again. It needs a root directory and no API server.

`stages` is the order of work with its reversal, `payload` the directory below /opt/katapod, `containerd_config` (pure)
the engine's configuration, `engine` the running engine, `proof` a sandbox that is started to see that it works, `host`
the one door to programs and files of the node. `main` is the program `kata-node`.
"""
