"""One training: begin, step, save, report, end."""
