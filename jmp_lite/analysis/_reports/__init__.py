"""What analyses found, on one page, in pictures, tables and files."""
