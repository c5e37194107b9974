"""attrfast's scores in other libraries' places, one module a library.

Importing attrfast imports none of these modules, nor their libraries.
"""
