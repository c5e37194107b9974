"""The commands of `attrfast`: each reads its arguments and prints; what it does is done elsewhere.

Everything heavy is imported by the command that needs it, so that `--help` answers at once.
"""
