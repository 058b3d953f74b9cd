"""User-mode Linux: a guest kernel that is a program of the host, and traces the guest's processes by ptrace(2).

plan.py is its command line, process.py the running kernel, machine.py the VirtualMachine, mconsole.py its control;
vmm.py is the Vmm. Devices are given on the command line, so a machine keeps what is attached and begins with run().
"""
