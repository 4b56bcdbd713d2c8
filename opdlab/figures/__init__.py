"""Figures: from a table to a picture, in one visual language; which arms there are is handed in."""
