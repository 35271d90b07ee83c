"""Files for other programs, one format a file: what each of them can carry of an artifact, and how it is written."""
