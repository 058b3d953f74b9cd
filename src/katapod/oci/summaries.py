"""What each verb of the OCI command line is for: for help and completion. Imports nothing."""

__all__ = ["SUMMARIES"]

SUMMARIES = {
    "create": "Create a container from a bundle, all but its program.",
    "start": "Run the program of a container that was created.",
    "run": "Create a container from a bundle, start it, and wait for its end.",
    "state": "Print the state of a container.",
    "kill": "Send a signal to a container, TERM unless another one is given.",
    "delete": "Remove a container that has stopped.",
    "exec": "Run a further process in a container.",
    "pause": "Freeze all processes of a container.",
    "resume": "Let a paused container go on.",
    "ps": "List the processes of a container.",
    "list": "List containers.",
    "events": "Print the resource usage of a container, again and again.",
    "update": "Change the limits of a container.",
    "spec": "Write a config.json to begin with.",
    "features": "Print what is supported of the runtime specification.",
}
"""What there is; checkpoint and restore are there to be refused."""
