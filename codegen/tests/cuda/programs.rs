//! Whole graphs: layers, and how many kernels they have.
