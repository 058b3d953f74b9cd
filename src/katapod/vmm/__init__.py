"""What the rest may say to a VMM, whichever it is: `spec` and `devices` are values, `protocol` is what a VMM can do.

Beside them `proof` and `template` plan what is booted to prove an accelerator, and what is saved to be cloned. Each VMM
has a room below this one: `qemu/`. Nobody else imports that, but for the one module of sandbox/ that chooses.
"""
