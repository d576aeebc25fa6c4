"""One paper's figures, of SHTA's tokens: what a branch embeds, where it is sure, and to which class it assigns."""
