"""The operations a layer is made of. `reference` has every one of them in plain torch; a kernel has the same signature."""
