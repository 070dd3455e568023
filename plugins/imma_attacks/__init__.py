"""The attacks that ship with imma. Each module is a plugin, found through the entry points of the group ``imma``."""
