"""observe: what only looks: `check`, `inspect`, `env`, `collect-data`, and the picture of a sandbox.

  check_host, check_engines, check_trials   collect facts of the machine     check, check_machine, ...   judge them
  inspection   facts of one sandbox          netns_facts, process_facts      where they are on the host
  explain      command lines in words        picture, svg                    the data paths, drawn
  collect      a bug report                  redact                          without its secrets

Nothing here changes a sandbox or the host, but for what check_trials makes in namespaces without a name. The doors call
this room; it may read all that is below it.
"""
