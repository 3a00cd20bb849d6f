"""`nmoe viz`: what runs are doing, in a browser. The run folders are read, never written."""
