"""Wants a module of the project that has the name of a package of ocd's."""

from mymodel import Net

from stages import width

assert width == 8
__all__ = ["Net"]
