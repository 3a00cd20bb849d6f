"""Router, dispatch, grouped GEMMs and combine of the experts."""
