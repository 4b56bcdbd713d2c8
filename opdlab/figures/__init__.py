"""Figures: functions from a table to a picture, in one visual language."""
