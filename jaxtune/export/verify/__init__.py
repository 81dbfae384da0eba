"""An export proves itself: what was written is read back and compared, before it bears its name."""
