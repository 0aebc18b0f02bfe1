"""Recipes: whole workflows on the blocks below."""
