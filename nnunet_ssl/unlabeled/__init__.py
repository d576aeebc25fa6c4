"""The images that have no labels: found, checked, prepared, split off and served."""
