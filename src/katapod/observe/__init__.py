"""observe: what only looks: `check`, `inspect`, `env`, `collect-data`, metrics, and the picture of a sandbox.

  check_host, check_engines, check_trials   collect facts of the machine     check, check_machine, ...   judge them
  management_server, management   answer for a sandbox of this process       live, guest_figures   ask its VMM and guest
  inspection   facts of one sandbox          netns_facts, process_facts      where they are on the host
  process_metrics, process_use, memory_use   what processes take             overhead   beside the containers' part
  explain      command lines in words        picture, svg                    the data paths, drawn
  collect      a bug report                  redact                          without its secrets

Nothing here changes a sandbox or the host, but for what check_trials makes in namespaces without a name, and for what a
client of the management server asks of the guest. The entry points call this room and open its server beside their
sandboxes; it may read what is below it.
"""
