"""The operations of a layer: `reference` has every one in plain torch, a kernel has the same signature."""
