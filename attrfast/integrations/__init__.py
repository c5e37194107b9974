"""attrfast's scores in other libraries' places, one module a library, each over the public API alone.

A module imports its library, so importing attrfast imports none of them.
"""
