"""synthhop: a made-up world of people, films, books, companies and cities, generated from a seed."""

from jraggym.data.synthhop.world import HOPS, SPLITS, World, make_world

__all__ = ["HOPS", "SPLITS", "World", "make_world"]
