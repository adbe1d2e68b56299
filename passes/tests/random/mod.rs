//! Random small graphs over the whole list of operations, with random ranks, pins and machines.
//!
//! A case is a list of genes, each of which adds one operation to what is there already and reads only its own words:
//! any sublist of the genes is a case too, and shrinking is leaving genes out.

mod grow;

use tpshard_ir::Graph;

/// SplitMix64.
pub(crate) struct Words(u64);

impl Words {
    pub(crate) fn of(seed: u64) -> Words {
        Words(seed)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound.max(1) as u64) as usize
    }

    pub(crate) fn chance(&mut self, of: usize) -> bool {
        self.below(of) == 0
    }

    pub(crate) fn pick<T: Copy>(&mut self, all: &[T]) -> Option<T> {
        let at = self.below(all.len());
        all.get(at).copied()
    }
}

/// Which machine is planned for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Machine {
    Usual,
    FreeLinks,
    /// No machine: everything is split that a rule can split.
    SplitAll,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Case {
    pub(crate) ranks: usize,
    pub(crate) machine: Machine,
    pub(crate) canonical: bool,
    /// Sizes of the symbols `b` and `s`.
    pub(crate) sizes: [i64; 2],
    pub(crate) genes: Vec<u64>,
    /// Words that choose a value and a dim.
    pub(crate) pins: Vec<u64>,
}

/// Most operations of a case, composed ones counted once.
const GENES: usize = 9;

impl Case {
    pub(crate) fn of(seed: u64) -> Case {
        let mut words = Words::of(seed);
        let ranks = 1 + words.below(6);
        let machine = [Machine::Usual, Machine::FreeLinks, Machine::SplitAll][words.below(3)];
        let canonical = words.chance(2);
        let sizes = [0; 2].map(|_| 1 + words.below(5) as i64);
        let genes = (0..2 + words.below(GENES - 1)).map(|_| words.next()).collect();
        let pins = (0..words.below(3)).map(|_| words.next()).collect();
        Case { ranks, machine, canonical, sizes, genes, pins }
    }

    pub(crate) fn graph(&self) -> Graph {
        grow::graph(&self.genes)
    }

    /// Cases with one thing less.
    fn smaller(&self) -> Vec<Case> {
        let mut all = Vec::new();
        for index in 0..self.genes.len() {
            let mut case = self.clone();
            case.genes.remove(index);
            all.push(case);
        }
        for index in 0..self.pins.len() {
            let mut case = self.clone();
            case.pins.remove(index);
            all.push(case);
        }
        all.extend((1..self.ranks).map(|ranks| Case { ranks, ..self.clone() }));
        if self.canonical {
            all.push(Case { canonical: false, ..self.clone() });
        }
        for at in 0..self.sizes.len() {
            if self.sizes[at] > 1 {
                let mut case = self.clone();
                case.sizes[at] = 1;
                all.push(case);
            }
        }
        all
    }

    /// The smallest case found by steps of one thing less that still fails, with what it says.
    pub(crate) fn shrunk(
        mut self,
        mut what: String,
        fails: &dyn Fn(&Case) -> Option<String>,
    ) -> (Case, String) {
        while let Some((case, says)) =
            self.smaller().into_iter().find_map(|case| fails(&case).map(|says| (case, says)))
        {
            (self, what) = (case, says);
        }
        (self, what)
    }
}
