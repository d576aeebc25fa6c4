"""Pictures for papers, from trained models: cases, entropy, tokens, assignment, curves, boxes."""
