//! A rank program as parts of a container, and back.
//!
//! | part | holds |
//! |---|---|
//! | `program` | version, rank, mesh, hashes, entries with ranges, states, weights; one fact per line |
//! | `states.tir` | type and layout of every state |
//! | `N/graph.tir` | the local graph of entry `N` |
//! | `N/families.tir` | the logical type and layout of every value of that graph |
//! | `N/inputs.tir`, `N/outputs.tir` | the ports |
//! | `N/cpu` | the lowering: one region per line |
//! | `cuda/source.cu`, `cuda/kernels`, `cuda/sm_90.cubin`, … | of programs for a GPU: kernel text, its table, machine code |
//! | `N/cuda` | how a GPU executes entry `N`: one step per line, its calls below it |
//!
//! Types with layouts are written as `.tir` programs whose values are inputs: one step per item.

use super::device::{self, DeviceError};
use super::lines::Words;
use super::lowering::{Kernel, Lowering, LoweringError, Region, Stage};
use super::{
    Entry, FORMAT_VERSION, Family, OLDEST_FORMAT_VERSION, Port, RankProgram, StateSpec, WeightTensor,
};
use crate::container::{self, ContainerError, Payload};
use crate::dim::Dim;
use crate::graph::{Graph, Node, SymbolRange, Type, ValueId};
use crate::infer::infer;
use crate::layout::Mesh;
use crate::op::Op;
use crate::spmd::{Spmd, Step, StepKind};
use crate::text::{TextError, parse_graph, parse_program, print_graph, print_program, quote};
use crate::verify::conversion_faults;
use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::Arc;

/// The part that says what the other parts are.
pub const PART_PROGRAM: &str = "program";
/// Most entries of a program.
const MAX_ENTRIES: usize = 256;

/// The part that holds the local graph of an entry.
pub fn graph_part(entry: usize) -> String {
    format!("{entry}/graph.tir")
}

/// Why bytes are not a rank program.
#[derive(Debug, thiserror::Error)]
pub enum ProgramError {
    #[error(transparent)]
    Container(#[from] ContainerError),
    #[error(
        "the program has version {found}, this runner reads {OLDEST_FORMAT_VERSION} to {FORMAT_VERSION}\n\
         help: build it again, or use the runner it was built with"
    )]
    Version { found: u32 },
    #[error("the program has no part `{part}`\nhelp: build it again")]
    Missing { part: String },
    #[error("part `{part}` of the program, line {line}: {what}\nhelp: build it again")]
    Line { part: String, line: usize, what: String },
    #[error("part `{part}` of the program: {error}\nhelp: build it again")]
    Text { part: String, error: TextError },
    #[error("part `{part}` of the program: {what}\nhelp: build it again")]
    Content { part: String, what: String },
    #[error("entry {entry} of the program: {error}")]
    Lowering { entry: usize, error: LoweringError },
    #[error("entry {entry} of the program: {error}")]
    Device { entry: usize, error: DeviceError },
}

type Result<T> = std::result::Result<T, ProgramError>;

impl RankProgram {
    /// The parts of this program: name and bytes, in order. Equal programs give equal bytes.
    pub fn to_parts(&self) -> Vec<(String, Vec<u8>)> {
        let mut parts = vec![(PART_PROGRAM.to_string(), self.manifest())];
        let states = self.states.iter().map(|s| (s.input.to_string(), &s.ty, &s.layout));
        parts.push(("states.tir".into(), typed_list(&self.mesh, states)));
        for (i, entry) in self.entries.iter().enumerate() {
            let ports = |ports: &[Port]| {
                typed_list(&self.mesh, ports.iter().map(|p| (p.name.to_string(), &p.ty, &p.layout)))
            };
            let families = entry.families.iter().enumerate().map(|(i, f)| (i.to_string(), &f.ty, &f.layout));
            parts.push((graph_part(i), print_graph(&entry.graph).into_bytes()));
            parts.push((format!("{i}/families.tir"), typed_list(&self.mesh, families)));
            parts.push((format!("{i}/inputs.tir"), ports(&entry.inputs)));
            parts.push((format!("{i}/outputs.tir"), ports(&entry.outputs)));
            parts.push((format!("{i}/cpu"), print_lowering(&entry.lowering)));
            if let Some(lowering) = &entry.device {
                parts.push((format!("{i}/cuda"), device::write_lowering(lowering)));
            }
        }
        if let Some(code) = &self.device {
            parts.extend(device::write_code(code));
        }
        parts
    }

    /// The program as a container, followed by `extra` parts (kernel text, certificates, …).
    ///
    /// # Errors
    /// Too many parts, or an extra part whose name is taken.
    pub fn encode(&self, extra: &[(&str, &[u8])]) -> Result<Vec<u8>> {
        let own = self.to_parts();
        let mut parts: Vec<(&str, &[u8])> = own.iter().map(|(n, b)| (n.as_str(), b.as_slice())).collect();
        parts.extend_from_slice(extra);
        Ok(container::encode(&parts)?)
    }

    /// Reads a program from a container and checks that its tables hold together.
    ///
    /// # Errors
    /// Which part and line is wrong.
    pub fn decode(bytes: &[u8]) -> Result<RankProgram> {
        RankProgram::from_payload(&container::decode(bytes)?)
    }

    /// As [`RankProgram::decode`], from a container that was decoded already.
    ///
    /// # Errors
    /// Which part and line is wrong.
    pub fn from_payload(payload: &Payload<'_>) -> Result<RankProgram> {
        Manifest::read(part(payload, PART_PROGRAM)?)?.with_parts(payload)
    }

    fn manifest(&self) -> Vec<u8> {
        let mut out = String::new();
        let mut line = |text: String| {
            out.push_str(&text);
            out.push('\n');
        };
        line(format!("tpshard-program {FORMAT_VERSION}"));
        line(format!("rank {}", self.rank));
        line(format!("mesh {}", join(&self.mesh.0)));
        line(format!("determinism {}", self.determinism));
        line(format!("weights_hash {}", quote(&self.weights_hash)));
        line(format!("program_hash {}", quote(&self.program_hash)));
        for entry in &self.entries {
            line(format!("entry {}", quote(&entry.name)));
            for (name, range) in &entry.ranges {
                line(format!("range {} {} {}", quote(name), range.low, range.high));
            }
            for port in entry.outputs.iter().filter(|p| p.keep_sharded) {
                line(format!("keep {}", quote(&port.name)));
            }
        }
        for state in &self.states {
            let slot_axis = state.slot_axis.map_or("none".into(), |a| a.to_string());
            line(format!("state {} {} {slot_axis}", quote(&state.output), state.axis));
        }
        for weight in &self.weights {
            let (name, expr) = (quote(&weight.name), quote(&weight.expr.to_string()));
            line(format!("weight {name} {expr} {} {}", weight.dtype, join(&weight.shape)));
        }
        out.into_bytes()
    }
}

fn join(numbers: &[usize]) -> String {
    numbers.iter().map(usize::to_string).collect::<Vec<_>>().join(" ")
}

pub(super) fn part<'a>(payload: &Payload<'a>, name: &str) -> Result<&'a str> {
    let bytes = payload.part(name).ok_or_else(|| ProgramError::Missing { part: name.into() })?;
    std::str::from_utf8(bytes).map_err(|e| ProgramError::Content { part: name.into(), what: e.to_string() })
}

/// Names with types and layouts, as a program of inputs.
fn typed_list<'a>(
    mesh: &Mesh,
    items: impl Iterator<Item = (String, &'a Type, &'a crate::layout::Layout)>,
) -> Vec<u8> {
    let mut logical = Graph::new("");
    let mut steps = Vec::new();
    for (name, ty, layout) in items {
        let value = logical.input(&name, ty.clone());
        steps.push(Step { value, layout: layout.clone(), kind: StepKind::Compute, args: vec![] });
    }
    let imported = logical.len();
    let (mesh, equations, outputs) = (mesh.clone(), vec![], vec![]);
    print_program(&Spmd { mesh, logical, imported, equations, steps, outputs }).into_bytes()
}

/// Reads what [`typed_list`] wrote.
fn read_typed_list(payload: &Payload<'_>, name: &str, mesh: &Mesh) -> Result<Vec<(Arc<str>, Family)>> {
    let text = part(payload, name)?;
    let list = parse_program(text).map_err(|error| ProgramError::Text { part: name.into(), error })?;
    let content = |what: String| ProgramError::Content { part: name.into(), what };
    let inputs: Vec<(ValueId, &Arc<str>, &Type)> = list.logical.inputs().collect();
    if list.mesh != *mesh || inputs.len() != list.logical.len() || list.steps.len() != inputs.len() {
        return Err(content("not a list of types and layouts over the program's mesh".into()));
    }
    let item = |((value, name, ty), step): (&(ValueId, &Arc<str>, &Type), &Step)| {
        let fits = step.value == *value
            && step.layout.0.len() == mesh.axes()
            && step.layout.0.iter().all(|a| a.sharded_dim().is_none_or(|d| d < ty.rank()));
        if !fits {
            return Err(content(format!("the layout {} of `{name}` does not fit {ty}", step.layout)));
        }
        Ok(((*name).clone(), Family { ty: (*ty).clone(), layout: step.layout.clone() }))
    };
    inputs.iter().zip(&list.steps).map(item).collect()
}

fn print_lowering(lowering: &Lowering) -> Vec<u8> {
    let mut out = String::new();
    for region in &lowering.regions {
        let stage = match region.stage {
            Stage::Load => "load",
            Stage::Step => "step",
        };
        let nodes: Vec<usize> = region.nodes.iter().map(|n| n.index()).collect();
        // Writing to a string cannot fail.
        let _ = writeln!(out, "{stage} {} {}", region.kernel.name(), join(&nodes));
    }
    out.into_bytes()
}

fn read_lowering(payload: &Payload<'_>, name: &str) -> Result<Lowering> {
    let mut regions = Vec::new();
    for mut words in Words::lines(name, part(payload, name)?)? {
        let stage = match words.word("a stage")?.as_str() {
            "load" => Stage::Load,
            "step" => Stage::Step,
            other => return Err(words.error(format!("`{other}` is not a stage"))),
        };
        let kernel = words.word("a kernel")?;
        let kernel = Kernel::ALL.iter().copied().find(|k| k.name() == kernel);
        let kernel = kernel.ok_or_else(|| words.error("an unknown kernel"))?;
        let nodes = words.rest::<u32>("a node")?.into_iter().map(ValueId).collect();
        regions.push(Region { kernel, stage, nodes });
    }
    Ok(Lowering { regions })
}

struct ManifestEntry {
    name: String,
    ranges: BTreeMap<Arc<str>, SymbolRange>,
    keep: Vec<String>,
}

/// The part `program`, read.
struct Manifest {
    program: RankProgram,
    entries: Vec<ManifestEntry>,
    /// Output, axis, slot axis.
    states: Vec<(Arc<str>, usize, Option<usize>)>,
}

impl Manifest {
    fn read(text: &str) -> Result<Manifest> {
        let mut lines = Words::lines(PART_PROGRAM, text)?.into_iter();
        let content = |what: &str| ProgramError::Content { part: PART_PROGRAM.into(), what: what.into() };
        let mut first = lines.next().ok_or_else(|| content("it is empty"))?;
        if first.word("the mark")? != "tpshard-program" {
            return Err(first.error("not a rank program"));
        }
        let version: u32 = first.parse("a version")?;
        if !(OLDEST_FORMAT_VERSION..=FORMAT_VERSION).contains(&version) {
            return Err(ProgramError::Version { found: version });
        }
        first.end()?;
        let program = RankProgram {
            rank: usize::MAX,
            mesh: Mesh(vec![]),
            determinism: super::Determinism::Fast,
            entries: vec![],
            states: vec![],
            weights: vec![],
            device: None,
            weights_hash: String::new(),
            program_hash: String::new(),
        };
        let mut manifest = Manifest { program, entries: vec![], states: vec![] };
        for words in lines {
            manifest.line(words)?;
        }
        let mesh = &manifest.program.mesh;
        let ranks = mesh.0.iter().try_fold(1usize, |n, &d| n.checked_mul(d)).unwrap_or(0);
        if mesh.0.is_empty() || ranks == 0 || ranks > 1024 || manifest.program.rank >= ranks {
            return Err(content("rank and mesh do not fit"));
        }
        Ok(manifest)
    }

    fn line(&mut self, mut words: Words<'_>) -> Result<()> {
        let key = words.word("a key")?;
        let program = &mut self.program;
        let has_room = self.entries.len() < MAX_ENTRIES;
        match (key.as_str(), self.entries.last_mut()) {
            ("rank", _) => program.rank = words.parse("a rank")?,
            ("mesh", _) => program.mesh = Mesh(words.rest("an extent")?),
            ("determinism", _) => program.determinism = words.parse("a level")?,
            ("weights_hash", _) => program.weights_hash = words.word("a hash")?,
            ("program_hash", _) => program.program_hash = words.word("a hash")?,
            ("entry", _) if has_room => {
                let name = words.word("a name")?;
                self.entries.push(ManifestEntry { name, ranges: BTreeMap::new(), keep: vec![] });
            }
            ("range", Some(entry)) => {
                let name: Arc<str> = words.word("a symbol")?.into();
                let (low, high) = (words.parse("a limit")?, words.parse("a limit")?);
                entry.ranges.insert(name, SymbolRange { low, high });
            }
            ("keep", Some(entry)) => entry.keep.push(words.word("an output")?),
            ("state", _) => {
                let (output, axis) = (words.word("an output")?.into(), words.parse("an axis")?);
                let slot_axis = words.word("a slot axis")?;
                let slot_axis = match slot_axis.as_str() {
                    "none" => None,
                    number => Some(number.parse().map_err(|_| words.error("a bad slot axis"))?),
                };
                self.states.push((output, axis, slot_axis));
            }
            ("weight", _) => {
                let name = words.word("a name")?;
                let expr = words.word("a weight")?;
                let expr = expr.parse().map_err(|e| words.error(format!("{e}")))?;
                let (dtype, shape) = (words.parse("an element type")?, words.rest("an extent")?);
                program.weights.push(WeightTensor { expr, name, dtype, shape });
            }
            (other, _) => return Err(words.error(format!("`{other}` is not known here"))),
        }
        words.end()
    }

    fn with_parts(self, payload: &Payload<'_>) -> Result<RankProgram> {
        let mut program = self.program;
        let states = read_typed_list(payload, "states.tir", &program.mesh)?;
        let content = |part: &str, what: String| ProgramError::Content { part: part.into(), what };
        if states.len() != self.states.len() {
            return Err(content("states.tir", format!("{} states, not {}", states.len(), self.states.len())));
        }
        for ((input, Family { ty, layout }), (output, axis, slot_axis)) in states.into_iter().zip(self.states)
        {
            if axis >= ty.rank() || slot_axis.is_some_and(|a| a >= ty.rank() || a == axis) {
                return Err(content("states.tir", format!("state `{input}` of {ty} has no such dims")));
            }
            program.states.push(StateSpec { input, output, axis, slot_axis, ty, layout });
        }
        for (i, entry) in self.entries.into_iter().enumerate() {
            program.entries.push(read_entry(payload, i, entry, &program.mesh)?);
        }
        program.device = device::read_code(payload)?;
        if let Some(code) = &program.device {
            for (i, entry) in program.entries.iter_mut().enumerate() {
                let lowering = device::read_lowering(payload, &format!("{i}/cuda"))?;
                lowering.check(code, entry).map_err(|error| ProgramError::Device { entry: i, error })?;
                entry.device = Some(lowering);
            }
        }
        Ok(program)
    }
}

fn read_entry(payload: &Payload<'_>, i: usize, head: ManifestEntry, mesh: &Mesh) -> Result<Entry> {
    let name = graph_part(i);
    let graph = parse_graph(part(payload, &name)?)
        .map_err(|error| ProgramError::Text { part: name.clone(), error })?;
    let content = |what: String| ProgramError::Content { part: name.clone(), what };
    if let Some((value, _)) = graph.values().find(|(v, n)| n.args.iter().any(|a| a >= v)) {
        return Err(content(format!("{value} uses a later value")));
    }
    if let Some(output) = graph.outputs.iter().find(|o| o.value.index() >= graph.len()) {
        return Err(content(format!("output `{}` is no value", output.name)));
    }
    if let Some(what) = graph.values().find_map(|(value, node)| node_fault(&graph, value, node)) {
        return Err(content(what));
    }
    let families: Vec<Family> =
        read_typed_list(payload, &format!("{i}/families.tir"), mesh)?.into_iter().map(|(_, f)| f).collect();
    if families.len() != graph.len() {
        return Err(content(format!("{} values, {} layouts", graph.len(), families.len())));
    }
    let ports = |kind: &str| -> Result<Vec<Port>> {
        let list = read_typed_list(payload, &format!("{i}/{kind}.tir"), mesh)?;
        let keep = |name: &str| kind == "outputs" && head.keep.iter().any(|k| k == name);
        let port = |(name, Family { ty, layout }): (Arc<str>, Family)| {
            let keep_sharded = keep(&name);
            Port { name, ty, layout, keep_sharded }
        };
        Ok(list.into_iter().map(port).collect())
    };
    let (inputs, outputs) = (ports("inputs")?, ports("outputs")?);
    let lowering = read_lowering(payload, &format!("{i}/cpu"))?;
    lowering.check(&graph).map_err(|error| ProgramError::Lowering { entry: i, error })?;
    Ok(Entry {
        name: head.name,
        ranges: head.ranges,
        graph,
        families,
        inputs,
        outputs,
        lowering,
        device: None,
    })
}

/// Why a node cannot be executed: executors rely on operand counts, axes and types being what inference says.
fn node_fault(graph: &Graph, value: ValueId, node: &Node) -> Option<String> {
    let types: Vec<&Type> = node.args.iter().map(|&arg| graph.ty(arg)).collect();
    let what = match &node.op {
        Op::Input { .. } if types.is_empty() => return None,
        Op::Input { .. } => "takes no operands".to_string(),
        Op::Convert(conversion) => conversion_faults(conversion, &types, &node.ty).into_iter().next()?,
        // A rank without output channels has no groups to count.
        Op::Conv { .. } if types.len() == 2 && node.ty.shape.get(1).is_some_and(Dim::is_zero) => return None,
        op => match infer(op, &types) {
            Ok(ty) if ty == node.ty => return None,
            Ok(ty) => format!("is declared {}, but makes {ty}", node.ty),
            Err(error) => error.what,
        },
    };
    Some(format!("{value} ({}): {what}", node.op.name()))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::dtype::DType;
    use crate::graph::{Output, StatePair};
    use crate::layout::{AxisLayout, Layout};
    use crate::op::Scalar;
    use crate::spmd::{SpmdOutput, StepId};
    use crate::weight::WeightExpr;

    pub(in crate::program) fn sample() -> RankProgram {
        let mut g = Graph::new("sample");
        let ty = |dims: Vec<Dim>| Type::new(DType::F32, dims);
        let past = g.input("past \"k\"", ty(vec![Dim::symbol("b"), Dim::symbol("past"), 4i64.into()]));
        let x = g.input("x", ty(vec![Dim::symbol("b"), Dim::symbol("s"), 4i64.into()]));
        let expr = WeightExpr::initializer("w \\", DType::F32, vec![4]).unwrap();
        let w = g.add(Op::Weight(expr), &[]).unwrap();
        let scaled = g.add(Op::Map(Scalar::Mul), &[x, w]).unwrap();
        let shifted = g.add(Op::Map(Scalar::Add), &[scaled, w]).unwrap();
        let present = g.add(Op::Append { axis: 1 }, &[past, shifted]).unwrap();
        g.outputs.push(Output { name: "present".into(), value: present });
        g.states.push(StatePair { input: "past \"k\"".into(), output: "present".into(), axis: 1 });
        g.symbols.insert("s".into(), SymbolRange { low: 1, high: 9 });
        let mesh = Mesh(vec![2, 2]);
        let split = Layout(vec![AxisLayout::Replicated, AxisLayout::shard(2, 2i64)]);
        let args = [vec![], vec![], vec![], vec![1, 2], vec![3, 2], vec![0, 4]];
        let steps = args
            .into_iter()
            .enumerate()
            .map(|(i, args)| Step {
                value: ValueId(i as u32),
                layout: if i == 2 {
                    Layout(vec![AxisLayout::Replicated, AxisLayout::shard(0, 2i64)])
                } else {
                    split.clone()
                },
                kind: StepKind::Compute,
                args: args.into_iter().map(StepId).collect(),
            })
            .collect();
        let outputs = vec![SpmdOutput { name: "present".into(), step: StepId(5) }];
        let spmd = Spmd { mesh, imported: g.len(), logical: g, equations: vec![], steps, outputs };
        let mut program = RankProgram::from_spmd(&spmd, 3).unwrap();
        program.weights_hash = "ab\n\"".into();
        program.entries[0].outputs[0].keep_sharded = true;
        program
    }

    #[test]
    fn programs_round_trip() {
        let program = sample();
        assert_eq!(program.states.len(), 1);
        let bytes = program.encode(&[("kernels.cu", b"text")]).unwrap();
        assert_eq!(RankProgram::decode(&bytes).unwrap(), program);
        assert_eq!(bytes, program.encode(&[("kernels.cu", b"text")]).unwrap());
        assert!(program.encode(&[("program", b"again")]).is_err());
    }

    /// The container of the sample with one part changed and its hashes made to fit.
    fn changed(name: &str, from: &str, to: &str) -> String {
        let mut parts = sample().to_parts();
        let part = parts.iter_mut().find(|(n, _)| n == name).unwrap();
        let text = String::from_utf8(part.1.clone()).unwrap();
        assert!(text.contains(from), "{text}");
        part.1 = text.replacen(from, to, 1).into_bytes();
        let list: Vec<(&str, &[u8])> = parts.iter().map(|(n, b)| (n.as_str(), b.as_slice())).collect();
        let error = RankProgram::decode(&container::encode(&list).unwrap()).unwrap_err();
        error.to_string()
    }

    #[test]
    fn altered_parts_are_errors_that_name_part_and_line() {
        assert!(changed("program", "tpshard-program 1", "tpshard-program 99").contains("version 99"));
        assert!(changed("program", "rank 3", "rank 4").contains("do not fit"));
        assert!(changed("program", "mesh 2 2", "mesh 2 0").contains("do not fit"));
        assert!(changed("program", "determinism fast", "determinism slow").contains("line 4: `slow`"));
        assert!(changed("program", "present\" 1 0", "present\" 1 9").contains("no such dims"));
        assert!(changed("states.tir", "S(2, 2)", "S(7, 2)").contains("states.tir"));
        assert!(changed("0/families.tir", "mesh", "mash").contains("0/families.tir"));
        assert!(changed("0/cpu", "leaf 0", "leaf 1").contains("region"));
        assert!(changed("0/cpu", "append", "softmax").contains("does not execute"));
        assert!(changed("0/cpu", "pointwise 3 4", "pointwise 3 99").contains("does not exist"));
        let missing = container::encode(&[("other", b"")]).unwrap();
        assert!(matches!(RankProgram::decode(&missing), Err(ProgramError::Missing { .. })));
    }
}
