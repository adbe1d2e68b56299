//! How long a collective takes: the fastest algorithm and protocol for its kind, its ranks and its size.
//!
//! A protocol on a link takes `base + steps · step + carried / bandwidth`. Algorithm and collective decide the steps
//! and the bytes carried past a rank. With `n` ranks and a tensor of `b` bytes:
//!
//! | algorithm | all-reduce | all-gather, reduce-scatter, all-to-all |
//! |---|---|---|
//! | ring | `2(n-1)` steps, `2(n-1)/n · b` | `n-1` steps, `(n-1)/n · b` |
//! | tree | `2(n-1)` steps (a chain within a node, `2 log2` between nodes), `2b` | none |
//! | switch | no steps, `2(n-1)/n · b` | none |
//!
//! Ranks on several nodes use a flat ring or tree over both links, or go up and down: a reduce-scatter within the node,
//! the rest between nodes on what is left, an all-gather within the node. `measured` protocols hold for one
//! collective, one number of ranks and a range of sizes, and are believed before all others.

use super::{Profile, count, positive};

/// What a collective does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Collective {
    AllReduce,
    AllGather,
    ReduceScatter,
    AllToAll,
    /// From one rank to another.
    Transfer,
}

impl Collective {
    pub const ALL: [Collective; 5] = [
        Collective::AllReduce,
        Collective::AllGather,
        Collective::ReduceScatter,
        Collective::AllToAll,
        Collective::Transfer,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Collective::AllReduce => "all-reduce",
            Collective::AllGather => "all-gather",
            Collective::ReduceScatter => "reduce-scatter",
            Collective::AllToAll => "all-to-all",
            Collective::Transfer => "transfer",
        }
    }

    /// Steps of a ring.
    fn steps(self, ranks: f64) -> f64 {
        match self {
            Collective::AllReduce => 2.0 * (ranks - 1.0),
            Collective::AllGather | Collective::ReduceScatter | Collective::AllToAll => ranks - 1.0,
            Collective::Transfer => 1.0,
        }
    }

    /// Bytes carried past a rank of a ring for every byte of the tensor.
    fn carried(self, ranks: f64) -> f64 {
        match self {
            Collective::Transfer => 1.0,
            _ => self.steps(ranks) / ranks,
        }
    }
}

/// How a protocol carries a collective.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Algorithm {
    Ring,
    /// All-reduces only.
    Tree,
    /// The switch combines and spreads what the ranks send it. All-reduces within a node only.
    Switch,
    /// What a calibration saw.
    Measured,
}

impl Algorithm {
    fn parse(word: &str) -> Option<Algorithm> {
        match word {
            "ring" => Some(Algorithm::Ring),
            "tree" => Some(Algorithm::Tree),
            "switch" => Some(Algorithm::Switch),
            "measured" => Some(Algorithm::Measured),
            _ => None,
        }
    }
}

/// One way in which a collective is carried over one link.
#[derive(Clone, Debug, PartialEq)]
pub struct Protocol {
    pub name: String,
    pub algorithm: Algorithm,
    /// Seconds before the first byte.
    pub base: f64,
    /// Seconds per step.
    pub step: f64,
    /// Bytes per second and direction.
    pub bandwidth: f64,
    /// Of a measured protocol.
    pub measured: Option<Measured>,
}

/// What a measured protocol holds for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Measured {
    pub collective: Collective,
    pub ranks: usize,
    /// Tensors of at most so many bytes; infinite in the last range.
    pub up_to: f64,
}

impl Protocol {
    /// Reads `[ring|tree|switch] base S [step S] bandwidth R`, or
    /// `measured all-reduce ranks N [up_to BYTES] base S bandwidth R`.
    pub(super) fn parse(name: &str, text: &str) -> Result<Protocol, String> {
        let mut words = text.split_whitespace().peekable();
        let algorithm = words.peek().and_then(|word| Algorithm::parse(word));
        if algorithm.is_some() {
            words.next();
        }
        let algorithm = algorithm.unwrap_or(Algorithm::Ring);
        let collective = match algorithm {
            Algorithm::Measured => {
                let word = words.next().unwrap_or_default();
                let found = Collective::ALL.into_iter().find(|c| c.name() == word);
                Some(found.ok_or_else(|| format!("`{word}` is not a collective"))?)
            }
            Algorithm::Ring | Algorithm::Tree | Algorithm::Switch => None,
        };
        let (mut base, mut step, mut bandwidth, mut ranks, mut up_to) = (None, None, None, None, None);
        while let Some(key) = words.next() {
            let value = words.next().ok_or_else(|| format!("`{key}` has no value"))?;
            let twice = match key {
                "base" => base.replace(positive(value)?).is_some(),
                "step" => step.replace(positive(value)?).is_some(),
                "bandwidth" => bandwidth.replace(positive(value)?).is_some(),
                "ranks" => ranks.replace(count(value)?).is_some(),
                "up_to" => up_to.replace(positive(value)?).is_some(),
                _ => return Err(format!("`{key}` is not part of a protocol")),
            };
            if twice {
                return Err(format!("`{key}` is given twice"));
            }
        }
        let reads = match algorithm {
            Algorithm::Ring | Algorithm::Tree => "base SECONDS step SECONDS bandwidth BYTES_PER_SECOND",
            Algorithm::Switch => "switch base SECONDS bandwidth BYTES_PER_SECOND",
            Algorithm::Measured => {
                "measured COLLECTIVE ranks N [up_to BYTES] base SECONDS bandwidth BYTES_PER_SECOND"
            }
        };
        let stepped = matches!(algorithm, Algorithm::Ring | Algorithm::Tree);
        let wrong = || format!("such a protocol reads `{reads}`");
        if step.is_some() != stepped || (collective.is_none() && (ranks.is_some() || up_to.is_some())) {
            return Err(wrong());
        }
        let measured = match (collective, ranks) {
            (None, _) => None,
            (Some(_), None) => return Err(wrong()),
            (Some(collective), Some(ranks)) => {
                Some(Measured { collective, ranks, up_to: up_to.unwrap_or(f64::INFINITY) })
            }
        };
        Ok(Protocol {
            name: name.to_owned(),
            algorithm,
            base: base.ok_or_else(wrong)?,
            step: step.unwrap_or(0.0),
            bandwidth: bandwidth.ok_or_else(wrong)?,
            measured,
        })
    }

    /// Within a node; `None` if the algorithm does not carry the collective.
    fn seconds(&self, collective: Collective, ranks: f64, bytes: f64) -> Option<f64> {
        let (steps, carried) = match (self.algorithm, collective) {
            (Algorithm::Ring, _) => (collective.steps(ranks), collective.carried(ranks)),
            (Algorithm::Tree, Collective::AllReduce) => (2.0 * (ranks - 1.0), 2.0),
            (Algorithm::Switch, Collective::AllReduce) => (0.0, collective.carried(ranks)),
            (Algorithm::Tree | Algorithm::Switch | Algorithm::Measured, _) => return None,
        };
        Some(self.base + steps * self.step + carried * bytes / self.bandwidth)
    }
}

/// Where the ranks of a collective are: on `nodes` nodes, at most `local` on each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Span {
    pub local: usize,
    pub nodes: usize,
}

impl Span {
    pub fn ranks(self) -> usize {
        self.local * self.nodes
    }
}

impl Profile {
    /// Seconds for a collective of `ranks` neighbouring ranks.
    ///
    /// `bytes` is the size of the whole tensor: what an all-reduce combines, what an all-gather results in, what a
    /// reduce-scatter starts from, what a rank holds before an all-to-all, what a transfer moves.
    pub fn collective_time(&self, collective: Collective, ranks: usize, bytes: f64) -> f64 {
        self.collective_over(collective, self.span(ranks), bytes)
    }

    /// As [`Profile::collective_time`], for ranks that lie as `span` says.
    pub fn collective_over(&self, collective: Collective, span: Span, bytes: f64) -> f64 {
        if span.ranks() <= 1 {
            return 0.0;
        }
        if span.nodes <= 1 {
            return self.within(collective, span.local, bytes);
        }
        let levels = self.up_and_down(collective, span, bytes);
        self.flat(collective, span, bytes).fold(levels, f64::min)
    }

    /// Where `ranks` neighbouring ranks lie.
    pub fn span(&self, ranks: usize) -> Span {
        let ranks = ranks.max(1);
        match self.node_ranks {
            Some(node) if ranks > node => Span { local: node, nodes: ranks.div_ceil(node) },
            _ => Span { local: ranks, nodes: 1 },
        }
    }

    /// Where the ranks lie that differ from rank 0 on these axes of a mesh only. The last axis counts fastest.
    pub fn span_of_axes(&self, mesh: &[usize], axes: &[usize]) -> Span {
        let sizes = axes.iter().filter_map(|&axis| mesh.get(axis));
        let Some(node) = self.node_ranks else {
            return Span { local: sizes.product::<usize>().max(1), nodes: 1 };
        };
        let mut ranks = vec![0usize];
        let mut stride = 1usize;
        for (axis, &size) in mesh.iter().enumerate().rev() {
            if axes.contains(&axis) {
                ranks = (0..size).flat_map(|i| ranks.iter().map(move |r| r + i * stride)).collect();
            }
            stride = stride.saturating_mul(size.max(1));
        }
        let nodes: std::collections::BTreeSet<usize> = ranks.iter().map(|r| r / node).collect();
        let nodes = nodes.len().max(1);
        Span { local: ranks.len().div_ceil(nodes), nodes }
    }

    /// Seconds for a collective of `steps` ring steps that carries `bytes` past each rank, within a node.
    pub fn collective(&self, steps: f64, bytes: f64) -> f64 {
        let rings = self.protocols.iter().filter(|p| p.algorithm == Algorithm::Ring);
        rings.map(|p| p.base + steps * p.step + bytes / p.bandwidth).fold(f64::INFINITY, f64::min)
    }

    /// One node.
    fn within(&self, collective: Collective, ranks: usize, bytes: f64) -> f64 {
        if ranks <= 1 {
            return 0.0;
        }
        if let Some(seconds) = self.measured(collective, ranks, bytes) {
            return seconds;
        }
        let seconds = self.protocols.iter().filter_map(|p| p.seconds(collective, ranks as f64, bytes));
        seconds.fold(f64::INFINITY, f64::min)
    }

    fn measured(&self, collective: Collective, ranks: usize, bytes: f64) -> Option<f64> {
        let fits = |m: &Measured| m.collective == collective && m.ranks == ranks && bytes <= m.up_to;
        let ranges = self.protocols.iter().filter_map(|p| Some((p, p.measured.filter(fits)?)));
        let (protocol, _) = ranges.min_by(|(_, a), (_, b)| a.up_to.total_cmp(&b.up_to))?;
        Some(protocol.base + bytes / protocol.bandwidth)
    }

    /// Rings and trees over all ranks; every pair of protocols of one name is one.
    fn flat(&self, collective: Collective, span: Span, bytes: f64) -> impl Iterator<Item = f64> {
        let pair = |near: &Protocol| self.network.iter().find(|far| far.name == near.name);
        let seconds = move |near: &Protocol, far: &Protocol| flat(near, far, collective, span, bytes);
        let times: Vec<f64> = self.protocols.iter().filter_map(|near| seconds(near, pair(near)?)).collect();
        times.into_iter()
    }

    /// Within the nodes, then between them on the part that is left, then within them again.
    fn up_and_down(&self, collective: Collective, span: Span, bytes: f64) -> f64 {
        let local = span.local as f64;
        let within = |collective, bytes| self.within(collective, span.local, bytes);
        let between = |collective, bytes| self.between(collective, span.nodes, bytes);
        match collective {
            Collective::AllReduce => {
                within(Collective::ReduceScatter, bytes)
                    + between(Collective::AllReduce, bytes / local)
                    + within(Collective::AllGather, bytes)
            }
            Collective::AllGather | Collective::ReduceScatter => {
                between(collective, bytes / local) + within(collective, bytes)
            }
            // First to the right place in each node, then each rank over its own part of the network.
            Collective::AllToAll => within(collective, bytes) + between(collective, bytes),
            Collective::Transfer => between(collective, bytes),
        }
    }

    /// Between one rank on each node.
    fn between(&self, collective: Collective, nodes: usize, bytes: f64) -> f64 {
        let seconds = self.network.iter().filter_map(|p| match (p.algorithm, collective) {
            (Algorithm::Tree, Collective::AllReduce) => {
                Some(p.base + 2.0 * (nodes as f64).log2().ceil() * p.step + 2.0 * bytes / p.bandwidth)
            }
            _ => p.seconds(collective, nodes as f64, bytes),
        });
        seconds.fold(f64::INFINITY, f64::min)
    }
}

fn flat(near: &Protocol, far: &Protocol, collective: Collective, span: Span, bytes: f64) -> Option<f64> {
    let (local, nodes) = (span.local as f64, span.nodes as f64);
    let ranks = local * nodes;
    let bandwidth = near.bandwidth.min(far.bandwidth * local);
    match (near.algorithm, far.algorithm, collective) {
        (
            Algorithm::Ring,
            Algorithm::Ring,
            Collective::AllReduce | Collective::AllGather | Collective::ReduceScatter,
        ) => {
            let crossings = collective.steps(nodes);
            let steps = collective.steps(ranks) - crossings;
            let carried = collective.carried(ranks) * bytes;
            Some(far.base + steps * near.step + crossings * far.step + carried / bandwidth)
        }
        (Algorithm::Tree, Algorithm::Tree, Collective::AllReduce) => {
            let levels = nodes.log2().ceil();
            let steps = 2.0 * ((local - 1.0) * near.step + levels * far.step);
            Some(far.base + steps + 2.0 * bytes / bandwidth)
        }
        _ => None,
    }
}
