"""Explanation methods, one file per family, their table, and the two ways to call them."""
