"""The metrics that ship with imma. Each module is a plugin, found through the entry points of the group ``imma``.

Nothing heavy is imported before a metric is used: all plugins are imported whenever attacks or metrics are listed.
"""
