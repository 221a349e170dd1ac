"""Comparisons: the same samples are built by several methods and measured together."""
