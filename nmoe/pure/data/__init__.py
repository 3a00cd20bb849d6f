"""Which tokens come next; how text is cut up."""
