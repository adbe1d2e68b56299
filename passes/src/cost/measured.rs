//! Prices of a machine that was calibrated: the work of a node times the rates that were measured.

use super::kernels::{Family, Look, Measured, Quantities, Sizes, Work, work};
use super::price::{Extents, Parts, bytes, look, product};
use super::profile::Profile;
use tpshard_ir::{Graph, Op, ValueId};

/// Computing and reading a weight take `(computing^p + reading^p)^(1/p)` together: infinity would be that one hides in the
/// other, 1 that they take turns. Products of 16 rows whose weights are larger than the caches were measured between the
/// two, and of 128 rows no slower than with weights in the caches.
const OVERLAP: f64 = 1.5;

/// The rates of a profile, and what they need to know of a graph.
pub(super) struct MeasuredKernels {
    rates: Measured,
    look: Look,
    /// The weights and inputs of a step are larger than the caches.
    cold: bool,
    /// Ranks that share the caches.
    ranks: f64,
    /// Inputs and outputs, per entry. States stay where they are.
    exchanged: Vec<Quantities>,
}

impl MeasuredKernels {
    /// None if the profile knows its machine from data sheets.
    pub(super) fn of(profile: &Profile, graph: &Graph, extents: &[Extents]) -> Option<MeasuredKernels> {
        let rates = profile.kernels.values().next()?.clone();
        let of = |value: ValueId, entry: usize| extents.get(value.index()).and_then(|e| e.get(entry));
        let elements = |value: ValueId, entry: usize| of(value, entry).map_or(0.0, |e| product(e));
        let size = |value: ValueId, entry: usize| -> f64 {
            of(value, entry).map_or(0.0, |e| bytes(graph.ty(value).dtype, e) as f64)
        };
        let held = |entry: usize| -> f64 {
            let held = graph.values().filter(|(_, n)| matches!(n.op, Op::Weight(_) | Op::Input { .. }));
            held.map(|(value, _)| size(value, entry)).sum()
        };
        let exchanged = |entry: usize| {
            let inputs =
                || graph.inputs().filter(|(_, name, _)| graph.states.iter().all(|s| s.input != **name));
            let outputs = graph.outputs.iter().filter(|o| graph.states.iter().all(|s| s.output != o.name));
            Quantities {
                call: 1.0,
                task: inputs().count() as f64,
                byte: inputs().map(|(value, ..)| size(value, entry)).sum(),
                element: outputs.map(|o| elements(o.value, entry)).sum(),
                operation: 0.0,
            }
        };
        let entries = extents.iter().map(Vec::len).max().unwrap_or(0);
        let most = (0..entries).map(held).fold(0.0, f64::max);
        Some(MeasuredKernels {
            rates,
            look: Look::new(graph),
            cold: profile.cache_bytes.is_none_or(|cache| most > cache),
            ranks: profile.shared_ranks.unwrap_or(1) as f64,
            exchanged: (0..entries).map(exchanged).collect(),
        })
    }

    /// What ranks wait for one another at a collective: seconds.
    pub(super) fn meeting(&self) -> f64 {
        self.rates.get(&Family::Meeting).map_or(0.0, |rates| rates.call)
    }

    /// Where the time of a step goes that computes nothing.
    pub(super) fn step(&self, entry: usize) -> Option<Parts> {
        let rates = self.rates.get(&Family::Step)?;
        Some(parts_of(self.exchanged.get(entry).copied().unwrap_or_default(), *rates))
    }

    pub(super) fn traits(&self, graph: &Graph, value: ValueId) -> impl Iterator<Item = u64> + use<> {
        self.look.traits(graph, value)
    }

    /// Where the time of a node goes.
    pub(super) fn parts(&self, profile: &Profile, graph: &Graph, value: ValueId, sizes: &Sizes<'_>) -> Parts {
        let (mut total, mut many_rows) = (Parts::default(), false);
        for Work { family, amounts } in work(graph, &self.look, value, sizes) {
            let Some(&rates) = self.rates.get(&family) else {
                // Not measured: taken to be moved.
                let moved = 4.0 * amounts.element.max(amounts.byte / 4.0) / profile.bandwidth();
                total.add(&Parts { memory: moved, launch: profile.kernel_launch, ..Parts::default() }, 1.0);
                continue;
            };
            total.add(&parts_of(amounts, rates), 1.0);
            many_rows |= family == Family::Product;
        }
        if self.cold {
            // Weights and state come from memory meanwhile, or in part before: one row waits for them, many rows hide it.
            let (computed, read) =
                (total.total(), self.held_bytes(graph, value, sizes) / profile.bandwidth());
            total.memory += if many_rows {
                (computed.powf(OVERLAP) + read.powf(OVERLAP)).powf(1.0 / OVERLAP) - computed
            } else {
                (read - computed).max(0.0)
            };
        }
        // What the caches do not hold comes from memory.
        let streamed = streamed(graph, value, sizes);
        if profile.cache_bytes.is_some_and(|most| streamed * self.ranks > most) && !self.look.is_view(value) {
            total.memory += (streamed / profile.bandwidth() - total.total()).max(0.0);
        }
        // Nothing is free, so that of equal plans the shorter one wins.
        let op = &graph.node(value).op;
        if total == Parts::default() && !matches!(op, Op::Input { .. } | Op::Weight(_) | Op::Literal(_)) {
            return look();
        }
        total
    }
}

impl MeasuredKernels {
    /// Bytes of weights and state that a product or attention reads.
    fn held_bytes(&self, graph: &Graph, value: ValueId, sizes: &Sizes<'_>) -> f64 {
        let node = graph.node(value);
        if self.look.constant[value.index()]
            || !matches!(node.op, Op::Einsum(_) | Op::Attention { .. } | Op::Conv { .. })
        {
            return 0.0;
        }
        let operands = node.args.iter().zip(sizes.operands).zip(sizes.bits);
        let held = operands.filter(|((arg, _), _)| self.look.held[arg.index()]);
        held.map(|((_, extents), bits)| product(extents) * bits / 8.0).sum()
    }
}

/// Bytes that a kernel moves between memory and caches. Lines that are written are read before.
fn streamed(graph: &Graph, value: ValueId, sizes: &Sizes<'_>) -> f64 {
    let node = graph.node(value);
    let written = product(sizes.out) * node.ty.dtype.bits() as f64 / 8.0;
    let read = sizes.operands.iter().zip(sizes.bits).map(|(e, bits)| product(e) * bits / 8.0);
    match node.op {
        Op::Gather { .. } => 3.0 * written,
        Op::Append { .. } => 0.0,
        _ => read.sum::<f64>() + 2.0 * written,
    }
}

/// Where the time of measured work goes.
fn parts_of(amounts: Quantities, rates: Quantities) -> Parts {
    Parts {
        compute: amounts.operation * rates.operation,
        memory: amounts.element * rates.element + amounts.byte * rates.byte,
        launch: amounts.call * rates.call + amounts.task * rates.task,
        communication: 0.0,
    }
}

#[cfg(test)]
mod tests {
    use crate::cost::Pricer;
    use crate::cost::price::Entry;
    use crate::cost::profile::Profile;
    use tpshard_ir::op::EinsumSpec;
    use tpshard_ir::weight::WeightExpr;
    use tpshard_ir::{DType, Dim, Graph, Layout, Mesh, Op, Output, Scalar, Type, ValueId};

    fn weight(graph: &mut Graph, shape: &[usize]) -> ValueId {
        let expr = WeightExpr::initializer("w".to_owned(), DType::F32, shape.to_vec()).unwrap();
        graph.add(Op::Weight(expr), &[]).unwrap()
    }

    /// The price of the last value of a graph on one rank.
    fn price(graph: &mut Graph, lines: &str) -> f64 {
        let last = ValueId(graph.len() as u32 - 1);
        graph.outputs.push(Output { name: "y".into(), value: last });
        let text = format!("{}\n{lines}", Profile::built_in_text("cpu-shm").unwrap());
        let profile = Profile::parse(&text).unwrap().shared_between(1);
        let entries = [Entry::new("main", Default::default())];
        let pricer = Pricer::new(&profile, graph, &entries);
        let mesh = Mesh::flat(1);
        let whole = Layout::replicated(&mesh);
        let layouts = vec![&whole; graph.node(last).args.len()];
        pricer.compute_parts(last, &layouts, &whole, &mesh, 0).total()
    }

    fn product(rows: usize) -> Graph {
        let mut graph = Graph::new("test");
        let x = graph.input("x", Type::new(DType::F32, vec![Dim::from(rows), Dim::from(8usize)]));
        let w = weight(&mut graph, &[8, 16]);
        graph.add(Op::Einsum(EinsumSpec::parse("mk,kn->mn").unwrap()), &[x, w]).unwrap();
        graph
    }

    const RATES: &str = "cache_bytes = 1e6 | x\n\
        kernel.product.1 = call 1 operation 1e-3 | x\n\
        kernel.vector.1 = call 2 byte 1e-3 | x\n\
        kernel.elementwise.1 = call 1 element 1e-3 operation 1 | x\n\
        kernel.view.1 = call 7 | x";

    fn near(found: f64, wanted: f64) {
        assert!((found / wanted - 1.0).abs() < 1e-9, "{found} instead of {wanted}");
    }

    #[test]
    fn a_product_of_one_row_is_another_kernel() {
        near(price(&mut product(4), RATES), 1.0 + 1e-3 * (2 * 4 * 8 * 16) as f64);
        near(price(&mut product(1), RATES), 2.0 + 1e-3 * (4 * 8 * 16) as f64);
    }

    #[test]
    fn weights_beyond_the_caches_come_from_memory() {
        let slow = RATES
            .replace("cache_bytes = 1e6", "cache_bytes = 100")
            .replace("call 1 operation 1e-3", "call 1e-12");
        let bandwidth = Profile::built_in("cpu-shm").unwrap().shared_between(1).bandwidth();
        // Everything that the product touches: rows and weight, and the result twice.
        near(price(&mut product(4), &slow), (4 * (4 * 8 + 8 * 16 + 2 * 4 * 16)) as f64 / bandwidth);
    }

    #[test]
    fn elementwise_work_counts_functions_operands_and_results() {
        let mut graph = Graph::new("test");
        let x = graph.input("x", Type::new(DType::F32, vec![Dim::from(10usize)]));
        graph.add(Op::Map(Scalar::Exp), &[x]).unwrap();
        // One function, one operand, one result, and ten exponentials.
        near(price(&mut graph, RATES), 1.0 + 30.0 * 1e-3 + 10.0);
    }

    #[test]
    fn what_depends_on_weights_only_costs_nothing() {
        let mut graph = Graph::new("test");
        let w = weight(&mut graph, &[8, 16]);
        graph.add(Op::Map(Scalar::Exp), &[w]).unwrap();
        assert!(price(&mut graph, RATES) < 1e-6);
    }
}
