"""The library behind `ocd`: it never prints, never exits, and needs no command line.

`stages.infer.open_run` is the entry point for Python programs; every command is a module and a function of the same name.
"""
