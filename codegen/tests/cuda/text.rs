//! The text of kernels.
