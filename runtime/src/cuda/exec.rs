//! Runs one entry on one GPU: its steps in order, put into the device's queue one after another. The host waits only where
//! it needs what was computed: for a collective, for a step that no kernel does, and at the end. Calls of kernels are
//! collected until something else is to follow, and put into the queue together (`queue`). Collectives that travel while the
//! device computes are in a second queue (`beside`).
//!
//! As on the CPU, a step that fails here only does not stop the rank, since other ranks would wait in the next
//! collective: zeros take the place of what is missing, the error is kept, and the caller tells all ranks at the end. A
//! device that fails altogether fails every step after, and the rank still takes part in all collectives.

mod aside;
mod host;
mod queue;

use super::calls::Sizes;
use super::graphs::Graphs;
use super::links::{Links, Operand, carries};
use super::plan::{Plan, size};
use super::prepared::{Origin, Prepared, Spacing};
use super::tensor::DeviceTensor;
use crate::comm::{CommError, Communicator, Tag, bytes};
use crate::cpu::constants::Constants;
use crate::cpu::convert::{Place, StepError, convert};
use crate::cpu::deferred::Deferred;
use crate::cpu::exec::{Finished, local_part};
use crate::cpu::kernels::Context;
use crate::cpu::step::{self, Failed, Held};
use crate::cpu::value::Value;
use crate::cpu::write_row;
use crate::session::now;
use queue::Waiting;
use std::collections::BTreeMap;
use std::sync::Arc;
use tpshard_driver::DriverError;
use tpshard_driver::cublaslt::{self, CublasLt, Element};
use tpshard_driver::cuda::{Device, Function, Lane, Memory};
use tpshard_ir::dim::{Bindings, Dim};
use tpshard_ir::layout::Mesh;
use tpshard_ir::program::device::{DeviceStep, FAULT_INDEX, How, Matrix, Product};
use tpshard_ir::program::{Entry, Family};
use tpshard_ir::{Conversion, DType, Graph, Op, Tensor, ValueId};

/// Bytes of the words in which kernels say what they met.
pub(super) const FAULT_BYTES: u64 = 32;
/// Fewest rows, and columns, of a product that the library is asked for.
const LEAST_ROWS: i64 = 16;

/// What a run of one entry is given.
pub(super) struct Run<'a> {
    pub(super) entry: &'a Entry,
    /// Its number in the program.
    pub(super) number: usize,
    pub(super) prepared: &'a Prepared,
    pub(super) device: &'a Device,
    /// What multiplies matrices, if it is there.
    pub(super) library: Option<&'a CublasLt>,
    /// What carries collectives between devices, if host memory does not.
    pub(super) links: Option<&'a Links>,
    /// The kernels, in the order of the program's table.
    pub(super) functions: &'a [Function],
    /// Constants on the device, by value.
    pub(super) constants: &'a BTreeMap<ValueId, Arc<Memory>>,
    /// Constants on the host.
    pub(super) host: &'a Constants,
    /// The number of each constant there.
    pub(super) ids: &'a [Option<usize>],
    pub(super) arena: &'a Arc<Memory>,
    pub(super) fault: &'a Memory,
    pub(super) plan: &'a Plan,
    pub(super) mesh: &'a Mesh,
    pub(super) rank: usize,
    /// The sizes of the inputs, the room of state, and what data has decided so far.
    pub(super) bindings: Bindings,
    /// Whole inputs, by name.
    pub(super) inputs: &'a BTreeMap<Arc<str>, Value>,
    /// State that stays on the device.
    pub(super) states: &'a BTreeMap<Arc<str>, DeviceTensor>,
    /// The dims of all calls under these bindings.
    pub(super) sizes: Sizes,
    pub(super) timed: bool,
    /// What puts many calls into the queue at once, if anything does.
    pub(super) graphs: Option<&'a mut Graphs>,
    /// Whether collectives travel while the device computes.
    pub(super) overlap: bool,
    /// Whether any are in the side queue that the main one has not waited for.
    pub(super) open: bool,
    /// Calls that are not in the queue yet.
    pub(super) waiting: Vec<Waiting>,
    /// How often waiting calls were put into the queue.
    pub(super) pieces: usize,
    pub(super) deferred: Deferred<'a>,
    /// Where every value lies that has been made.
    pub(super) spots: Vec<Option<Spot>>,
    pub(super) failure: Option<Failed>,
}

/// Device memory from a byte on.
#[derive(Clone)]
pub(super) struct Spot {
    memory: Arc<Memory>,
    offset: u64,
}

fn local(error: impl std::fmt::Display) -> StepError {
    StepError::Local(error.to_string())
}

impl<'a> Run<'a> {
    fn graph(&self) -> &'a Graph {
        &self.entry.graph
    }

    fn context(&self) -> Context<'_> {
        Context { bindings: &self.bindings, graph: &self.entry.graph }
    }

    fn family(&self, value: ValueId) -> Result<&'a Family, String> {
        self.entry.families.get(value.index()).ok_or_else(|| format!("{value} has no layout"))
    }

    /// Runs all steps; `taps` are values to hand back.
    pub(super) fn run(
        mut self,
        taps: &[ValueId],
        communicator: &dyn Communicator,
        sequence: &mut u64,
    ) -> Result<Finished, CommError> {
        let mut times = Vec::new();
        if let Some(links) = self.links {
            links.blame(None);
        }
        if let Err(error) = self.fault.clear(0, FAULT_BYTES) {
            self.keep(Failed::Step(error.to_string()));
        }
        for (value, memory) in self.constants {
            self.put_spot(*value, Some(Spot { memory: memory.clone(), offset: 0 }));
        }
        let prepared = self.prepared;
        for (index, step) in prepared.steps.iter().enumerate() {
            let start = if self.timed { now() } else { 0 };
            if self.plan.beside.joins(index) {
                self.join(communicator)?;
            }
            let made = self.step(index, step, communicator, sequence);
            if self.is_full() {
                self.flush(communicator)?;
            }
            if self.timed {
                // Without this, times would be those of putting work into the queue.
                let _ = self.device.synchronize();
                times.push((step.value, start, now()));
            }
            if let Err(error) = made {
                // What comes before is not to be computed with the zeros.
                if !matches!(error, StepError::Collective(_)) {
                    self.flush(communicator)?;
                }
                self.failed(index, step.value, error, communicator)?;
            }
        }
        self.flush(communicator)?;
        self.join(communicator)?;
        let outputs = self.graph().outputs.iter().map(|output| self.output(output.value, &output.name));
        let outputs: Vec<Result<Held, (ValueId, String)>> = outputs.collect();
        let outputs = outputs.into_iter().map(|held| {
            held.unwrap_or_else(|(value, what)| {
                let failed = step::describe(self.graph(), value, StepError::Local(what));
                self.failure.get_or_insert(failed);
                Held::Here(step::zeros(&self.entry.graph, &self.bindings, value))
            })
        });
        let outputs = outputs.collect();
        let tapped = |&value: &ValueId| Some((value, self.fetch(value).ok()?));
        let taps = taps.iter().filter_map(tapped).collect();
        // Reading the words waits for all work, so that what the device has to say is known now.
        if let Some(failed) = self.fault() {
            self.failure.get_or_insert(failed);
        }
        if let Some(links) = self.links {
            links.note(communicator);
            // Collectives that were ended leave anything behind.
            if let Some(failure) = links.failure() {
                return Err(failure);
            }
        }
        Ok(Finished { outputs, taps, failure: self.failure, times, bindings: self.bindings })
    }

    fn step(
        &mut self,
        index: usize,
        step: &DeviceStep,
        communicator: &dyn Communicator,
        sequence: &mut u64,
    ) -> Result<(), StepError> {
        let value = step.value;
        if !self.may_wait(index, step) {
            self.flush(communicator)?;
        }
        match &step.how {
            How::Leaf => self.leaf(index, value),
            How::Alias(of) => {
                let spot = self.spot(*of)?;
                self.put_spot(value, Some(spot));
                Ok(())
            }
            // Made in pieces, before each is summed.
            How::Launch(_) | How::Product(_) if self.pieces_of(index + 1).is_some() => {
                self.begin(index, value)?;
                Ok(())
            }
            How::Launch(_) => {
                self.begin(index, value)?;
                self.launch_all(index, step, communicator)
            }
            How::Product(product) => {
                self.begin(index, value)?;
                let taken = self.multiplied(product, None, communicator)?;
                if taken { Ok(()) } else { self.launch_all(index, step, communicator) }
            }
            How::Append { state, .. } => {
                let spot = self.spot(*state)?;
                self.put_spot(value, Some(spot));
                self.launch_all(index, step, communicator)
            }
            How::Convert => self.convert(index, value, communicator, sequence),
            How::Host => {
                let made = self.on_host(value, communicator)?;
                let made = step::checked(self.graph(), &self.bindings, value, made)?;
                Ok(self.store(index, value, made)?)
            }
        }
    }

    /// Remembers the first failure, also for those who look after the collectives.
    fn keep(&mut self, failed: Failed) {
        if self.failure.is_none() {
            if let Some(links) = self.links {
                links.blame(Some(failed.to_string()));
            }
            self.failure = Some(failed);
        }
    }

    /// What ended the collectives, if that is what a step of this rank met as well and nobody knew it before.
    fn explained(&self, failure: CommError, failed: &Failed) -> CommError {
        match failure {
            CommError::Device { rank, what } if rank == self.rank && self.failure.is_none() => {
                CommError::Device { rank, what: format!("{failed}; after that, {what}") }
            }
            other => other,
        }
    }

    /// Notes that a step failed and gives others zeros to go on with.
    ///
    /// # Errors
    /// The run is over.
    fn failed(
        &mut self,
        index: usize,
        value: ValueId,
        error: StepError,
        communicator: &dyn Communicator,
    ) -> Result<(), CommError> {
        if let StepError::Collective(error) = error {
            return Err(self.ended(communicator, error));
        }
        let failed = step::describe(self.graph(), value, error);
        if let Some(failure) = self.links.and_then(Links::failure) {
            return Err(self.ended(communicator, self.explained(failure, &failed)));
        }
        self.keep(failed);
        // What is on its way to where the zeros come would come after them.
        self.join(communicator)?;
        self.put_zeros(index, value);
        Ok(())
    }

    /// Zeros for a value that could not be made, if it has memory of its own: state stays as it was. Where there is no
    /// memory for zeros either, reading the value fails in turn.
    fn put_zeros(&mut self, index: usize, value: ValueId) {
        let given = match &self.graph().node(value).op {
            Op::Input { name } => self.states.contains_key(name),
            _ => false,
        };
        if !given && self.prepared.origin_of(value) == Some(Origin::Step(index)) {
            let zeros = step::zeros(self.graph(), &self.bindings, value);
            let _ = self.store(index, value, zeros);
        }
    }

    fn spot(&self, value: ValueId) -> Result<Spot, String> {
        let spot = self.spots.get(value.index()).cloned().flatten();
        spot.ok_or_else(|| format!("{value} is not there"))
    }

    fn put_spot(&mut self, value: ValueId, spot: Option<Spot>) {
        if let Some(place) = self.spots.get_mut(value.index()) {
            *place = spot;
        }
    }

    /// Gives a value the memory that its step begins.
    fn begin(&mut self, index: usize, value: ValueId) -> Result<Spot, String> {
        let spot = match self.plan.places.get(index).copied().flatten() {
            Some(offset) => Spot { memory: self.arena.clone(), offset },
            None => {
                // Its size was not known when the run began.
                let room = self.prepared.rooms.get(index).and_then(Option::as_ref);
                let room = room.ok_or_else(|| format!("{value} has no memory of its own"))?;
                let bytes = size(value, room.dtype, &room.elements, &self.bindings);
                let bytes = bytes.map_err(|e| e.to_string())?;
                let bytes = bytes.ok_or_else(|| format!("the size of {value} is not known"))?;
                let memory = self.device.allocate(bytes).map_err(|e| e.to_string())?;
                Spot { memory: Arc::new(memory), offset: 0 }
            }
        };
        self.put_spot(value, Some(spot.clone()));
        Ok(spot)
    }

    /// Puts a value of the host where its step says.
    fn store(&mut self, index: usize, value: ValueId, made: Value) -> Result<(), String> {
        let spot = match self.prepared.origin_of(value) {
            Some(Origin::Step(from)) if from == index => self.begin(index, value)?,
            _ => self.spot(value)?,
        };
        let tensor = match self.prepared.spacing.get(&value) {
            Some(Spacing { axis, .. }) => {
                let shape = self.spaced_shape(value)?;
                let mut whole = Tensor::zeros(made.dtype(), shape).map_err(|e| e.to_string())?;
                write_row(&mut whole, *axis, 0, &made)?;
                Arc::new(whole)
            }
            None => made.tensor()?,
        };
        spot.memory.upload(spot.offset, bytes(tensor.data())).map_err(|e| e.to_string())
    }

    fn spaced_shape(&self, value: ValueId) -> Result<Vec<usize>, String> {
        let context = self.context();
        self.prepared.spaced_shape(self.entry, value).iter().map(|dim| context.size(dim)).collect()
    }

    fn leaf(&mut self, index: usize, value: ValueId) -> Result<(), StepError> {
        let Op::Input { name } = &self.graph().node(value).op else {
            let made = step::leaf(&self.context(), &self.graph().node(value).op)?;
            return Ok(self.store(index, value, made)?);
        };
        if let Some(state) = self.states.get(name) {
            let room = self.prepared.rooms.get(index).and_then(Option::as_ref);
            let elements = room.map(|room| room.elements.eval(&self.bindings));
            let needed = elements.and_then(Result::ok).and_then(|n| u64::try_from(n).ok());
            let needed = needed.and_then(|n| self.graph().ty(value).dtype.byte_len(n));
            if needed != Some(state.memory.len()) {
                return Err(format!("state `{name}` has other sizes than its memory").into());
            }
            self.put_spot(value, Some(Spot { memory: state.memory.clone(), offset: 0 }));
            return Ok(());
        }
        let whole = self.inputs.get(name).ok_or_else(|| format!("input `{name}` is not there"))?;
        let place = Place { mesh: self.mesh, rank: self.rank, bindings: &self.bindings };
        let part = local_part(whole, self.family(value)?, &place)?;
        let part = step::checked(self.graph(), &self.bindings, value, part)?;
        Ok(self.store(index, value, part)?)
    }

    /// The error that ends a run, after the collectives that were done before it are noted.
    fn ended(&self, communicator: &dyn Communicator, error: CommError) -> CommError {
        if let Some(links) = self.links {
            links.note(communicator);
        }
        error
    }

    /// As [`Run::convert`], from device to device.
    fn convert_between(
        &mut self,
        index: usize,
        [from, value]: [ValueId; 2],
        conversion: &Conversion,
        links: &Links,
        (communicator, tag): (&dyn Communicator, Tag),
    ) -> Result<(), StepError> {
        let pieces = match self.in_pieces(index, from, communicator) {
            // As below.
            Err(StepError::Local(what)) => return Err(links.give_up(communicator, what).into()),
            pieces => pieces?,
        };
        let mut lost = None;
        let lane = if self.overlap && self.plan.beside.is_aside(index) { Lane::Side } else { Lane::Main };
        let prepared = self.dense(from, &mut lost).and_then(|source| {
            let target = self.begin(index, value)?;
            let context = self.context();
            let shapes = [from, value].map(|value| context.shape(self.graph().ty(value)));
            let [from_shape, to_shape] = shapes;
            if lane == Lane::Side && pieces.is_empty() {
                links.ready(0).map_err(|e| e.to_string())?;
            }
            Ok((source, target, [from_shape?, to_shape?]))
        });
        let (source, target, [from_shape, to_shape]) = match prepared {
            Ok(prepared) => prepared,
            // The others wait for this rank, which cannot come.
            Err(what) => return Err(links.give_up(communicator, what).into()),
        };
        let dtypes = [from, value].map(|value| self.graph().ty(value).dtype);
        let operands = [
            Operand::new(&source.memory, source.offset, dtypes[0], &from_shape),
            Operand::new(&target.memory, target.offset, dtypes[1], &to_shape),
        ];
        let families = [self.family(from)?, self.family(value)?];
        let place = Place { mesh: self.mesh, rank: self.rank, bindings: &self.bindings };
        links.convert(conversion, operands, families, &place, (lane, &pieces), (communicator, tag))?;
        self.open |= lane == Lane::Side;
        lost.map_or(Ok(()), |what: String| Err(what.into()))
    }

    /// Where a value lies densely; a copy of one that does not, and zeros for one that is lost.
    fn dense(&self, value: ValueId, lost: &mut Option<String>) -> Result<Spot, String> {
        if let Ok(spot) = self.spot(value)
            && !self.prepared.spacing.contains_key(&value)
        {
            return Ok(spot);
        }
        let brought = self.fetch(value).unwrap_or_else(|what| {
            *lost = Some(what);
            step::zeros(self.graph(), &self.bindings, value)
        });
        let memory = upload(self.device, &brought)?;
        Ok(Spot { memory: Arc::new(memory), offset: 0 })
    }

    /// All ranks take part, also one that has nothing to bring.
    fn convert(
        &mut self,
        index: usize,
        value: ValueId,
        communicator: &dyn Communicator,
        sequence: &mut u64,
    ) -> Result<(), StepError> {
        let node = self.graph().node(value);
        let (Op::Convert(conversion), Some(&from)) = (&node.op, node.args.first()) else {
            return Err("a conversion of nothing".into());
        };
        *sequence += 1;
        let tag = Tag { sequence: *sequence, node: value.0 };
        if let Some(links) = self.links.filter(|_| carries(conversion, node.ty.dtype)) {
            return self.convert_between(index, [from, value], conversion, links, (communicator, tag));
        }
        let mut lost = None;
        let brought = self.fetch(from).unwrap_or_else(|what| {
            lost = Some(what);
            step::zeros(self.graph(), &self.bindings, from)
        });
        if let Some(failure) = self.links.and_then(Links::failure) {
            return Err(failure.into());
        }
        let families = [self.family(from)?, self.family(value)?];
        let place = Place { mesh: self.mesh, rank: self.rank, bindings: &self.bindings };
        let converted = convert(conversion, brought, families, &place, communicator, tag)?;
        let converted = step::checked(self.graph(), &self.bindings, value, converted)?;
        self.store(index, value, converted)?;
        lost.map_or(Ok(()), |what| Err(what.into()))
    }

    /// True if the library has taken the product, of a piece under the piece's bindings.
    fn multiplied(
        &mut self,
        product: &Product,
        piece: Option<&Bindings>,
        communicator: &dyn Communicator,
    ) -> Result<bool, StepError> {
        let Some(library) = self.library else { return Ok(false) };
        let element = match product.dtype {
            DType::F32 => Element::F32,
            DType::F64 => Element::F64,
            DType::F16 => Element::F16,
            DType::BF16 => Element::BF16,
            _ => return Ok(false),
        };
        let bindings = piece.unwrap_or(&self.bindings);
        let size = |dim: &Dim| dim.eval(bindings).map_err(|error| error.to_string());
        let (rows, columns) = (size(&product.rows)?, size(&product.columns)?);
        // Products of few rows read one operand once, which our own kernels do as fast.
        if rows.min(columns) < LEAST_ROWS {
            return Ok(false);
        }
        self.flush(communicator)?;
        let bindings = piece.unwrap_or(&self.bindings);
        let size = |dim: &Dim| dim.eval(bindings).map_err(|error| error.to_string());
        let matrix = |matrix: &Matrix| -> Result<cublaslt::Matrix<'_>, String> {
            let spot = self.spots.get(matrix.value.index()).and_then(Option::as_ref);
            let spot = spot.ok_or_else(|| format!("{} is not there", matrix.value))?;
            let bytes = size(&matrix.offset)?.checked_mul(product.dtype.bits() as i64 / 8);
            let offset = bytes.and_then(|bytes| spot.offset.checked_add_signed(bytes));
            let offset = offset.ok_or("a place beyond memory")?;
            let [batch, row, column] = [size(&matrix.batch)?, size(&matrix.row)?, size(&matrix.column)?];
            Ok(cublaslt::Matrix { memory: &spot.memory, offset, batch, row, column })
        };
        let asked = cublaslt::Product {
            element,
            batch: size(&product.batch)?,
            rows,
            columns,
            depth: size(&product.depth)?,
            left: matrix(&product.left)?,
            right: matrix(&product.right)?,
            result: matrix(&product.result)?,
        };
        library.multiply(&asked).map_err(local)
    }

    /// What this rank holds of an output.
    fn output(&self, value: ValueId, name: &str) -> Result<Held, (ValueId, String)> {
        let own_state = self.prepared.spacing.get(&value).and_then(|spacing| {
            let pair = self.entry.graph.states.iter().find(|pair| *pair.output == *name)?;
            let state = self.states.get(&pair.input)?;
            let spot = self.spot(value).ok()?;
            Arc::ptr_eq(&spot.memory, &state.memory).then_some(spacing.axis)
        });
        let held = match own_state {
            Some(axis) => {
                let dim = self.graph().ty(value).shape.get(axis);
                let length = dim.map_or(Ok(0), |dim| self.context().size(dim));
                length.map(|length| Held::InState { length })
            }
            None => self.fetch(value).map(Held::Here),
        };
        held.map_err(|what| (value, what))
    }

    /// What kernels met, after all of them are done.
    fn fault(&self) -> Option<Failed> {
        let mut bytes = [0u8; FAULT_BYTES as usize];
        if let Err(error) = self.fault.download(0, &mut bytes) {
            return Some(Failed::Step(error.to_string()));
        }
        let mut words = bytes.chunks_exact(8).map(|word| {
            let mut whole = [0u8; 8];
            whole.copy_from_slice(word);
            i64::from_le_bytes(whole)
        });
        let mut word = || words.next().unwrap_or(0);
        let [code, value, index, extent] = [word(), word(), word(), word()];
        if code == 0 {
            return None;
        }
        let value = u32::try_from(value).ok().filter(|&v| (v as usize) < self.graph().len()).map(ValueId);
        let node = value.map_or_else(|| "a kernel".into(), |value| step::name(self.graph(), value));
        Some(match code {
            FAULT_INDEX => Failed::Index { node, index, extent },
            _ => Failed::Step(format!("{node}: division by zero")),
        })
    }
}

/// Copies a value to the device.
fn upload(device: &Device, value: &Value) -> Result<Memory, String> {
    let tensor = value.tensor()?;
    let data = bytes(tensor.data());
    let put = || -> Result<Memory, DriverError> {
        let memory = device.allocate(data.len() as u64)?;
        memory.upload(0, data)?;
        Ok(memory)
    };
    put().map_err(|error| error.to_string())
}
