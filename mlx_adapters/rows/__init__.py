"""What people have (files, tables, Python objects) to rows of one form."""
