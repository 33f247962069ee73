"""Keeps the kernel equal to the desired state: the pass, and the loops that ask for one."""
