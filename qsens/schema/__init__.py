"""What is written down, versioned: one sentence a key; no torch."""
