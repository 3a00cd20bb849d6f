"""Which part of which tensor lies where, its digest, what is kept."""
