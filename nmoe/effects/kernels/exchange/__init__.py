"""Expert-parallel dispatch and combine over symmetric memory."""
