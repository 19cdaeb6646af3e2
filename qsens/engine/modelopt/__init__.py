"""What ModelOpt itself computes: the reference engine, and evaluation of whole recipes."""
