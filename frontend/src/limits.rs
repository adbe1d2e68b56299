//! What a model may cost to read.
//!
//! Every bound is far above any real model and far below what brings a machine down. Weights do not count: they are
//! mapped, not read.

/// Bounds on reading one model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Nodes in all graphs and functions, before and after functions are inlined.
    pub nodes: u64,
    /// Inputs of one node.
    pub node_inputs: usize,
    /// Length in bytes of one name or other text.
    pub text: u64,
    /// Heap for the decoded structure that is granted to a file of any size.
    pub heap_base: u64,
    /// Further heap granted per byte of the file (weights in typed fields decode to several times their size).
    pub heap_per_byte: u64,
    /// Dimensions of one tensor.
    pub rank: usize,
    /// Elements of one stored tensor.
    pub elements: u64,
    /// Graphs within graphs (`If`, `Loop`, `Scan`).
    pub subgraph_depth: usize,
    /// Functions that call functions.
    pub call_depth: usize,
    /// Distinct external data files.
    pub external_files: usize,
    /// Whether external data may be a file with several hard links. Off by default because a link planted beside a
    /// model gives the model any file of the same file system; caches that store files by hard link need it on.
    pub allow_hard_links: bool,
    /// Whether data files may be missing: enough for planning, which looks at shapes alone.
    pub allow_missing_data: bool,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            nodes: 65_536,
            node_inputs: 16_384,
            text: 1 << 20,
            heap_base: 256 << 20,
            heap_per_byte: 12,
            rank: 64,
            elements: 1 << 40,
            subgraph_depth: 32,
            call_depth: 64,
            external_files: 16_384,
            allow_hard_links: false,
            allow_missing_data: false,
        }
    }
}

impl Limits {
    /// Heap granted to a file of `file_len` bytes.
    pub fn heap(&self, file_len: u64) -> u64 {
        self.heap_base.saturating_add(self.heap_per_byte.saturating_mul(file_len))
    }
}
