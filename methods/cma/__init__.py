"""CMA: cross-modal affinity (hengliusky/Few_shot_RVOS)."""
