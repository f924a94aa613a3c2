"""The operations of a layer: `dispatch` runs each where its tensors are, `reference` has every one in plain
torch, and a module named after an operation has its Triton kernel."""
