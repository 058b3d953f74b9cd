"""All of QEMU: its command line, hot-plug, its monitor (QMP), its process."""
