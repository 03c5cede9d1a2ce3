"""Who computes: one engine per file. Heavy imports happen while loading, never before."""
