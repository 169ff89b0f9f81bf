"""Reading: any real file becomes one canonical coarse cube."""
