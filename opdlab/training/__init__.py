"""How models learn: SFT, OPD and RLVR in one loop, readable without the rest of the library."""
