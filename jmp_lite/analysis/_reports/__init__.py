"""Reports of analyses: one page, plots, tables and files."""
