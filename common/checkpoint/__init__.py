"""A checkpoint's files: their format, how they are written, an unfinished one, and its metadata."""
