"""One file a kind of attention: its parameter record, its function, the reference of its kernel."""
