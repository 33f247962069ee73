"""What the node remembers: identity, desired snapshot, unsent drift. Whole files, written so that a crash at any
moment leaves the old or the new one, never a part.

Everything here blocks for the length of an fsync: on the event loop it belongs in a thread.
"""
