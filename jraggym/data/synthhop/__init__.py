"""synthhop: a made-up world of people, films, books, companies and cities, generated from a seed."""

from jraggym.data.synthhop.world import SPLITS, World, make_world

__all__ = ["SPLITS", "World", "make_world"]
