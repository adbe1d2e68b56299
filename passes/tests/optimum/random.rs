//! Small layout graphs that no model has: every feature of the planner's graphs, in any combination, at any price.

use tpshard_ir::{AxisLayout, Conversion, Graph, Layout, Mesh, Type, ValueId};
use tpshard_passes::cost::Cost;
use tpshard_passes::layout_graph::{Edge, Exit, Group, GroupKind, LayoutGraph, Operand, Production};

/// SplitMix64.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn word(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Less than `count`.
    pub(crate) fn below(&mut self, count: u64) -> u64 {
        self.word() % count.max(1)
    }

    pub(crate) fn range(&mut self, low: u64, high: u64) -> u64 {
        low + self.below(high - low + 1)
    }

    /// True `percent` times in a hundred.
    pub(crate) fn often(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }
}

/// How prices are drawn: with many ties, or with hardly any.
#[derive(Clone, Copy)]
struct Prices {
    picoseconds: u64,
    collectives: bool,
    least_bytes: u64,
    bytes: u64,
}

impl Prices {
    fn draw(random: &mut Random) -> Prices {
        let (least_bytes, bytes) =
            [(0, 3), (1, 10), (100, 1000), (1 << 34, 2), (0, 1 << 36)][random.below(5) as usize];
        Prices {
            picoseconds: [1, 3, 10, 1000, 1_000_000, 1 << 40][random.below(6) as usize],
            collectives: random.often(50),
            least_bytes,
            bytes,
        }
    }

    fn cost(self, random: &mut Random) -> Cost {
        let seconds = random.range(0, self.picoseconds) as f64 * 1e-12;
        if self.collectives && random.often(30) {
            Cost::collective(seconds, random.below(4))
        } else {
            Cost::local(seconds)
        }
    }

    fn bytes(self, random: &mut Random) -> u64 {
        self.least_bytes + random.range(0, self.bytes)
    }
}

pub(crate) fn some_value() -> ValueId {
    let mut graph = Graph::new("one value");
    graph.input("x", Type::new(tpshard_ir::DType::F32, Vec::new()))
}

pub(crate) fn blank(kind: GroupKind, layouts: u64) -> Group {
    Group {
        value: some_value(),
        kind,
        layouts: vec![Layout(vec![AxisLayout::Replicated]); layouts as usize],
        homes: false,
        single: false,
        productions: Vec::new(),
        conversions: Vec::new(),
        exits: Vec::new(),
    }
}

/// Conversions between the first `layouts` slots: all, some or none.
fn conversions(random: &mut Random, prices: Prices, layouts: u64) -> Vec<Edge> {
    let percent = [0, 50, 80, 100][random.below(4) as usize];
    let mut all = Vec::new();
    for from in 0..layouts as u8 {
        for to in (0..layouts as u8).filter(|&to| to != from) {
            if random.often(percent) {
                let conversion = Some(Conversion::Transfer);
                all.push(Edge { from, to, conversion, cost: prices.cost(random) });
            }
        }
    }
    all
}

fn stored(random: &mut Random, prices: Prices, layouts: u64) -> Group {
    let layouts = layouts.min(3);
    let mut group = blank(GroupKind::Stored, layouts);
    group.homes = random.often(40);
    group.single = group.homes;
    group.conversions = conversions(random, prices, layouts);
    for slot in 0..layouts as u8 {
        let out = if group.homes { slot + layouts as u8 } else { slot };
        let (value, bytes) = (group.value, prices.bytes(random));
        group.productions.push(Production { out, operands: Vec::new(), value, cost: Cost::ZERO, bytes });
        if group.homes {
            group.conversions.push(Edge { from: out, to: slot, conversion: None, cost: Cost::ZERO });
        }
    }
    group
}

/// A layout of one of `groups`; not a home.
fn operand(random: &mut Random, groups: &[Group], low: usize) -> Operand {
    let index = random.range(low as u64, groups.len() as u64 - 1) as usize;
    let slot = random.below(groups[index].layouts.len() as u64) as u8;
    Operand { group: index as u32, slot }
}

fn computed(random: &mut Random, prices: Prices, layouts: u64, groups: &[Group], low: usize) -> Group {
    let mut group = blank(GroupKind::Computed, layouts);
    group.conversions = conversions(random, prices, layouts);
    for _ in 0..random.range(1, 5) {
        let count = random.range(1, 3);
        group.productions.push(Production {
            out: random.below(layouts) as u8,
            operands: (0..count).map(|_| operand(random, groups, low)).collect(),
            value: group.value,
            cost: prices.cost(random),
            bytes: 0,
        });
    }
    group
}

/// Makes an output of the last group, with states that stay at home in some of its exits.
fn exits(random: &mut Random, prices: Prices, groups: &mut [Group]) {
    let Some((last, below)) = groups.split_last_mut() else { return };
    if last.kind == GroupKind::Free {
        return;
    }
    let homes: Vec<usize> = (0..below.len()).filter(|&g| below[g].homes).collect();
    for slot in 0..last.layouts.len() as u8 {
        if !last.exits.is_empty() && random.often(40) {
            continue;
        }
        let read_only = last.homes && random.often(50);
        let mut also = Vec::new();
        if !homes.is_empty() && random.often(50) {
            let state = homes[random.below(homes.len() as u64) as usize];
            let layouts = below[state].layouts.len() as u64;
            also.push(Operand { group: state as u32, slot: (layouts + random.below(layouts)) as u8 });
        }
        let slot = if read_only { slot + last.layouts.len() as u8 } else { slot };
        last.exits.push(Exit { slot, cost: prices.cost(random), collected: 0, also });
    }
}

pub(crate) fn finish(groups: Vec<Group>) -> LayoutGraph {
    LayoutGraph { mesh: Mesh::flat(2), groups, group_of: Vec::new() }
}

/// Three to eight groups. Operands are any earlier groups, so values are shared, and weights used at both ends.
pub(crate) fn graph(seed: u64) -> LayoutGraph {
    let mut random = Random(seed);
    let prices = Prices::draw(&mut random);
    let count = random.range(3, 8);
    let most_layouts = random.range(1, 4);
    let mut groups = vec![stored(&mut random, prices, most_layouts)];
    while (groups.len() as u64) < count {
        let layouts = random.range(1, most_layouts);
        let group = match random.below(10) {
            0 => blank(GroupKind::Free, layouts),
            1..=3 => stored(&mut random, prices, layouts),
            _ => computed(&mut random, prices, layouts, &groups, 0),
        };
        groups.push(group);
        if groups.len() as u64 == count || random.often(15) {
            exits(&mut random, prices, &mut groups);
        }
    }
    finish(groups)
}

/// A block of eight to eleven groups several times over, with the first weight used by the last block again.
pub(crate) fn layers(seed: u64) -> LayoutGraph {
    let mut random = Random(seed);
    let prices = Prices::draw(&mut random);
    let layouts = random.range(1, 3);
    let block = random.range(8, 11) as usize;
    let mut groups = vec![stored(&mut random, prices, layouts)];
    let mut first: Vec<Group> = Vec::new();
    for index in 0..block {
        // Operands are at most three groups away, so that what runs between blocks is narrow.
        let low = groups.len().saturating_sub(3);
        let group = if index % 3 == 1 && index + 1 < block {
            stored(&mut random, prices, layouts)
        } else {
            computed(&mut random, prices, layouts, &groups, low)
        };
        first.push(group.clone());
        groups.push(group);
    }
    // The first operand of later blocks is the last group of the block before.
    for layer in 1..random.range(2, 4) as usize {
        for group in &first {
            let mut group = group.clone();
            for operand in group.productions.iter_mut().flat_map(|p| &mut p.operands) {
                operand.group += (layer * block) as u32;
                let layouts = groups[operand.group as usize].layouts.len() as u8;
                operand.slot %= layouts;
            }
            groups.push(group);
        }
    }
    let mut head = computed(&mut random, prices, layouts, &groups, groups.len() - 1);
    for production in &mut head.productions {
        production
            .operands
            .push(Operand { group: 0, slot: random.below(groups[0].layouts.len() as u64) as u8 });
    }
    groups.push(head);
    exits(&mut random, prices, &mut groups);
    finish(groups)
}

/// The same graph at other prices; bytes stay.
pub(crate) fn repriced(graph: &LayoutGraph, seed: u64) -> LayoutGraph {
    let mut random = Random(seed);
    let prices = Prices::draw(&mut random);
    let mut graph = graph.clone();
    for group in &mut graph.groups {
        if group.kind == GroupKind::Computed {
            group.productions.iter_mut().for_each(|p| p.cost = prices.cost(&mut random));
        }
        let priced = group.conversions.iter_mut().filter(|e| e.conversion.is_some());
        priced.for_each(|e| e.cost = prices.cost(&mut random));
        group.exits.iter_mut().for_each(|e| e.cost = prices.cost(&mut random));
    }
    graph
}

/// All graphs that lack one thing of this one, smallest changes last.
pub(crate) fn smaller(graph: &LayoutGraph) -> Vec<LayoutGraph> {
    let mut all = Vec::new();
    for index in 0..graph.groups.len() {
        let group = &graph.groups[index];
        let mut with = |change: &dyn Fn(&mut Group)| {
            let mut next = graph.clone();
            change(&mut next.groups[index]);
            all.push(next);
        };
        if group.exits.len() > 1 || graph.groups[index + 1..].iter().any(|g| !g.exits.is_empty()) {
            (0..group.exits.len()).for_each(|i| with(&|g| drop(g.exits.remove(i))));
        }
        (0..group.exits.len()).filter(|&i| !group.exits[i].also.is_empty()).for_each(|i| {
            with(&|g| g.exits[i].also.clear());
        });
        (0..group.productions.len()).for_each(|i| with(&|g| drop(g.productions.remove(i))));
        (0..group.conversions.len()).for_each(|i| with(&|g| drop(g.conversions.remove(i))));
        for (i, production) in group.productions.iter().enumerate() {
            (0..production.operands.len()).for_each(|o| {
                with(&|g| {
                    g.productions[i].operands.remove(o);
                })
            });
        }
    }
    all
}

/// The graph in a few lines.
pub(crate) fn text(graph: &LayoutGraph) -> String {
    let cost = |c: Cost| c.picoseconds();
    let operands =
        |all: &[Operand]| -> String { all.iter().map(|o| format!(" {}.{}", o.group, o.slot)).collect() };
    let mut text = String::new();
    for (index, group) in graph.groups.iter().enumerate() {
        let single = if group.single { " single" } else { "" };
        text += &format!("group {index}: {:?}, {} slots{single}\n", group.kind, group.slots());
        for p in &group.productions {
            text += &format!(
                "  {} <-{} at {} ps, {} bytes\n",
                p.out,
                operands(&p.operands),
                cost(p.cost),
                p.bytes
            );
        }
        for e in &group.conversions {
            text += &format!("  {} -> {} at {} ps\n", e.from, e.to, cost(e.cost));
        }
        for e in &group.exits {
            text += &format!("  exit {} at {} ps, also{}\n", e.slot, cost(e.cost), operands(&e.also));
        }
    }
    text
}
