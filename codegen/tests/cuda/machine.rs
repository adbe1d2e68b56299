//! A device that is ordinary memory: it follows the tables of an entry.

use super::case::{Case, weight};
use super::library::Kernels;
use std::collections::BTreeMap;
use std::ffi::c_void;
use tpshard_ir::dim::Bindings;
use tpshard_ir::interp::eval_tensors;
use tpshard_ir::program::device::{Argument, DeviceCode, How, Launch, capacity_symbol};
use tpshard_ir::program::{Entry, RankProgram};
use tpshard_ir::{DType, Dim, Op, Tensor, ValueId};

/// Entries of room beyond what is there, so that spacing shows.
const SPARE: i64 = 3;

pub(crate) struct Machine<'a> {
    code: &'a DeviceCode,
    kernels: &'a Kernels,
    entry: &'a Entry,
    case: &'a Case,
    bindings: Bindings,
    reference: &'a [Tensor],
    memory: BTreeMap<ValueId, Vec<u64>>,
    rooms: BTreeMap<ValueId, Vec<Dim>>,
    scratch: Vec<u64>,
    pub(crate) fault: [i64; 4],
    /// How many steps were left to the CPU.
    pub(crate) host: usize,
}

impl<'a> Machine<'a> {
    pub(crate) fn new(
        program: &'a RankProgram,
        index: usize,
        kernels: &'a Kernels,
        case: &'a Case,
        reference: &'a [Tensor],
    ) -> Machine<'a> {
        let entry = &program.entries[index];
        let mut bindings = case.bindings.clone();
        let mut rooms = BTreeMap::new();
        for pair in &entry.graph.states {
            let k = program.states.iter().position(|s| s.input == pair.input).unwrap();
            let symbol = capacity_symbol(k);
            let output = entry.graph.outputs.iter().find(|o| o.name == pair.output).unwrap().value;
            let input = entry.graph.inputs().find(|(_, name, _)| **name == pair.input).unwrap().0;
            let length = entry.graph.ty(output).shape[pair.axis].eval(&bindings).unwrap();
            bindings.insert(symbol.as_str().into(), length + SPARE);
            for value in [input, output] {
                let mut room = entry.graph.ty(value).shape.clone();
                room[pair.axis] = Dim::symbol(&symbol);
                rooms.insert(value, room);
            }
        }
        let code = program.device.as_ref().unwrap();
        let (memory, scratch) = (BTreeMap::new(), vec![]);
        let (fault, host) = ([0; 4], 0);
        Machine { code, kernels, entry, case, bindings, reference, memory, rooms, scratch, fault, host }
    }

    /// Follows all steps; the result of the first kernel that fails.
    pub(crate) fn run(&mut self) -> Result<(), String> {
        for step in &self.entry.device.as_ref().unwrap().steps {
            let value = step.value;
            match &step.how {
                How::Leaf => {
                    let node = self.entry.graph.node(value);
                    let tensor = match &node.op {
                        Op::Input { name } => self.case.inputs[&**name].clone(),
                        Op::Weight(expr) => weight(expr),
                        _ => self.reference[value.index()].clone(),
                    };
                    self.write(value, &tensor);
                }
                How::Alias(from) => {
                    let memory = self.memory[from].clone();
                    self.memory.insert(value, memory);
                }
                How::Launch(_) | How::Product(_) => {
                    self.allocate(value);
                    let bytes = step.scratch.eval(&self.bindings).map_err(|e| e.to_string())?;
                    self.scratch = vec![u64::MAX; bytes as usize / 8 + 1];
                    self.launches(step.how.launches())?;
                }
                How::Append { state, launches } => {
                    let memory = self.memory[state].clone();
                    self.memory.insert(value, memory);
                    self.launches(launches)?;
                }
                How::Convert => return Err("a conversion on one rank".into()),
                How::Host => {
                    self.host += 1;
                    let node = self.entry.graph.node(value);
                    let args: Vec<Tensor> = node.args.iter().map(|&a| self.read(a)).collect();
                    let tensor = eval_tensors(
                        &node.op,
                        &node.ty,
                        &args.iter().collect::<Vec<_>>(),
                        &self.bindings,
                        1 << 24,
                    )
                    .map_err(|e| e.to_string())?;
                    self.write(value, &tensor);
                }
            }
        }
        Ok(())
    }

    fn launches(&mut self, launches: &[Launch]) -> Result<(), String> {
        launches.iter().try_for_each(|launch| self.launch(launch))
    }

    fn launch(&mut self, launch: &Launch) -> Result<(), String> {
        let kernel = &self.code.kernels[launch.kernel];
        let eval = |dim: &Dim| dim.eval(&self.bindings).map_err(|e| format!("{}: {e}", kernel.name));
        let mut grid = [0u32; 3];
        for (g, dim) in grid.iter_mut().zip(&launch.blocks) {
            *g = u32::try_from(eval(dim)?).map_err(|e| format!("{}: {e}", kernel.name))?;
        }
        if grid.contains(&0) {
            return Ok(());
        }
        // Every argument is 8 bytes, wherever the kernel looks at fewer.
        let mut words: Vec<u64> = Vec::new();
        for argument in &launch.arguments {
            words.push(match argument {
                Argument::Value { value, offset } => {
                    let bits = eval(offset)? * self.entry.graph.ty(*value).dtype.bits() as i64;
                    let memory = self.memory.get_mut(value).ok_or("a value is not there")?;
                    (memory.as_mut_ptr() as u64).wrapping_add_signed(bits / 8)
                }
                Argument::Size(dim) => eval(dim)? as u64,
                Argument::Real(bits) => u64::from(*bits),
                Argument::Fault => self.fault.as_mut_ptr() as u64,
                Argument::Scratch { offset } => {
                    (self.scratch.as_mut_ptr() as u64).wrapping_add_signed(eval(offset)?)
                }
            });
        }
        let mut pointers: Vec<*mut c_void> = words.iter_mut().map(|w| std::ptr::from_mut(w).cast()).collect();
        match self.kernels.launch(&kernel.name, grid, launch.threads, launch.shared, &mut pointers) {
            0 => Ok(()),
            code => Err(format!("{} ended with {code}", kernel.name)),
        }
    }

    fn room(&self, value: ValueId) -> Vec<usize> {
        let room = self.rooms.get(&value).unwrap_or(&self.entry.graph.ty(value).shape);
        room.iter().map(|d| d.eval(&self.bindings).unwrap() as usize).collect()
    }

    fn shape(&self, value: ValueId) -> Vec<usize> {
        let shape = &self.entry.graph.ty(value).shape;
        shape.iter().map(|d| d.eval(&self.bindings).unwrap() as usize).collect()
    }

    fn dtype(&self, value: ValueId) -> DType {
        self.entry.graph.ty(value).dtype
    }

    fn allocate(&mut self, value: ValueId) {
        let bytes = self.dtype(value).byte_len(self.room(value).iter().product::<usize>() as u64).unwrap();
        // Not a number, in every float type.
        self.memory.insert(value, vec![u64::MAX; bytes.div_ceil(8) as usize + 1]);
    }

    /// For every element of `shape`, in order, its place in memory of `room`.
    fn places(shape: &[usize], room: &[usize]) -> Vec<usize> {
        let place = |flat: usize| {
            let (mut rest, mut stride, mut place) = (flat, 1, 0);
            for (&extent, &space) in shape.iter().zip(room).rev() {
                place += rest % extent * stride;
                rest /= extent;
                stride *= space;
            }
            place
        };
        (0..shape.iter().product()).map(place).collect()
    }

    fn write(&mut self, value: ValueId, tensor: &Tensor) {
        self.allocate(value);
        let (room, bytes) = (self.room(value), tensor.data().to_le_bytes());
        let mut all: Vec<u8> = self.memory[&value].iter().flat_map(|w| w.to_le_bytes()).collect();
        if self.rooms.contains_key(&value) {
            let width = self.dtype(value).bits() / 8;
            for (i, at) in Machine::places(tensor.shape(), &room).into_iter().enumerate() {
                all[at * width..(at + 1) * width].copy_from_slice(&bytes[i * width..(i + 1) * width]);
            }
        } else {
            all[..bytes.len()].copy_from_slice(&bytes);
        }
        let words = all.chunks_exact(8).map(|c| u64::from_le_bytes(c.try_into().unwrap())).collect();
        self.memory.insert(value, words);
    }

    pub(crate) fn read(&self, value: ValueId) -> Tensor {
        let (shape, room, dtype) = (self.shape(value), self.room(value), self.dtype(value));
        let all: Vec<u8> = self.memory[&value].iter().flat_map(|w| w.to_le_bytes()).collect();
        let bytes = if self.rooms.contains_key(&value) {
            let width = dtype.bits() / 8;
            let places = Machine::places(&shape, &room);
            places.into_iter().flat_map(|at| all[at * width..(at + 1) * width].to_vec()).collect()
        } else {
            let count = shape.iter().product::<usize>() as u64;
            all[..dtype.byte_len(count).unwrap() as usize].to_vec()
        };
        Tensor::from_le_bytes(dtype, shape, &bytes).unwrap()
    }
}
