"""Rows of results on file, and the tables and plots made from them."""
